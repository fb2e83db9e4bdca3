"""Tables that compare methods, of one result directory or over several seeds."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fedseg.errors import StoreError

Result = dict[str, Any]
"""What `result.json` holds."""

CAPTION = "R: share of pooled Dice. W: worst site's deficit against pooled. G: smallest gain over training alone."


def load_result(directory: Path) -> Result:
    """Read a result directory's `result.json`.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    path = directory if directory.is_file() else directory / "result.json"
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        result["final"], result["headline"], result["sites"]
    except FileNotFoundError:
        hint = "`fedseg simulate` writes it when it has finished"
        if (seeds := with_seeds(directory)) != [directory]:
            hint = f"this folder has several seeds, name one of {', '.join(map(str, seeds))}"
        raise StoreError(f"{path}: no such file; {hint}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not a result of `fedseg simulate`: {type(error).__name__}: {error}") from error
    return result


def of_seed(study: Path, seed: int) -> Path:
    """Where a study of several seeds has the results of one."""
    return study / f"seed-{seed}"


def with_seeds(directory: Path) -> list[Path]:
    """The result directories of a study of several seeds in their order, or the directory itself if it is none."""
    if (directory / "result.json").exists():
        return [directory]
    names = (found.name.removeprefix("seed-") for found in directory.glob("seed-*"))
    seeds = sorted(int(name) for name in names if name.isascii() and name.isdecimal())
    return [of_seed(directory, seed) for seed in seeds] or [directory]


def load_study(directories: Sequence[Path]) -> list[Result]:
    """Results of one scenario with different seeds.

    Raises:
        StoreError: a directory holds no finished simulation, or one of another study.
    """
    results = [load_result(directory) for directory in directories]
    first = results[0]
    for directory, result in zip(directories, results, strict=True):
        if (result["name"], [*result["headline"]]) != (first["name"], [*first["headline"]]):
            raise StoreError(
                f"{directory}: holds {result['name']} ({', '.join(result['headline'])}); seeds of one study have one name "
                f"and the same methods, and {directories[0]} holds {first['name']} ({', '.join(first['headline'])})"
            )
    return results


def mean_of_seeds(directories: Sequence[Path]) -> Result:
    """One study's result with the Dice of every hospital, and its training cases, as means over seeds.

    Raises:
        StoreError: as `load_study`.
    """
    results = load_study(directories)
    first = results[0]
    final = {}
    for method in methods_of(first):
        ours = [result["final"][method] for result in results]
        final[method] = {
            part: {site: statistics.fmean(one[part][site] for one in ours) for site in ours[0].get(part, {})}
            for part in ("sites", "unseen")
        }
    cases = {
        site: {"training_cases": round(statistics.fmean(result["sites"][site]["training_cases"] for result in results))}
        for site in first["sites"]
    }
    seeds = f"{first['name']}, mean of {len(results)} seeds" if len(results) > 1 else first["name"]
    return first | {"name": seeds, "final": final, "sites": cases}


def method_table(results: Sequence[Result]) -> Table:
    """One row per method: Dice in [0, 1], HD95 in mm, R in percent, W and G in Dice points; mean ± SD over several results."""
    first = results[0]
    labels = list(next(iter(first["final"].values()))["labels"])
    seeds = f", seeds {', '.join(str(result['seed']) for result in results)}" if len(results) > 1 else ""
    table = Table(title=f"{first['name']}{seeds}: scored on {first['test']}", title_justify="left")
    for heading in ("method", "Dice", "worst site", *labels, "HD95 mm", "R %", "W pt", "G pt"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method in methods_of(first):
        table.add_row(method, *_cells(results, method, labels))
    table.caption, table.caption_justify = CAPTION, "left"
    return table


def comparison_table(studies: Sequence[Sequence[Result]]) -> Table:
    """One row per study and method, for studies that differ in their network or training; columns as in `method_table`.

    Raises:
        StoreError: they were scored on other structures or other test cases.
    """
    first = studies[0][0]
    labels = list(next(iter(first["final"].values()))["labels"])
    for results in studies:
        for result in results:
            found = next(iter(result["final"].values()))
            if list(found["labels"]) != labels or (result["test"], found["cases"]) != (first["test"], _cases(first)):
                raise StoreError(
                    f"{result['name']}, seed {result['seed']}, was scored on {found['cases']} cases ({result['test']}; "
                    f"{', '.join(found['labels'])}), {first['name']} on {_cases(first)} ({first['test']}; {', '.join(labels)})"
                )
    table = Table(title=f"scored on {first['test']}", title_justify="left")
    for heading in (
        "study",
        "network",
        "seeds",
        "method",
        "Dice",
        "worst site",
        *labels,
        "HD95 mm",
        "R %",
        "W pt",
        "G pt",
    ):
        table.add_column(heading, justify="left" if heading in ("study", "network", "method") else "right")
    for results in studies:
        model = results[0]["model"]
        network = f"{model['name']} {model['preset'] or ''}".rstrip()
        for method in methods_of(results[0]):
            table.add_row(results[0]["name"], network, str(len(results)), method, *_cells(results, method, labels))
        table.add_section()
    table.caption, table.caption_justify = CAPTION, "left"
    return table


def site_table(results: Sequence[Result]) -> Table:
    """One row per site: its scanner, its training cases and each method's Dice; then hospitals that took no part."""
    first = results[0]
    methods, hospitals = methods_of(first), first.get("hospitals", {})
    left_out = any(result.get("leave_one_out") for result in results)
    table = Table(title="Dice by site", title_justify="left")
    kinds = [kind for kind in ("scanner", "annotator") if any(hospital.get(kind) for hospital in hospitals.values())]
    broken = [method.replace("-", "-\n") for method in methods]  # many methods make a wide table
    for heading in ("site", *kinds, "training\ncases", *broken, *(["without\nit"] if left_out else [])):
        table.add_column(heading, justify="left" if heading in ("site", *kinds) else "right")
    unseen = unseen_of(first)
    for site in (*first["sites"], *unseen):
        about = [hospitals.get(site, {}).get(kind) or "" for kind in kinds]
        counts = [float(result["sites"][site]["training_cases"]) for result in results] if site not in unseen else []
        part = "unseen" if site in unseen else "sites"
        dice = [[result["final"][method].get(part, {}).get(site) for result in results] for method in methods]
        cells = [*about, spread(counts, 0) or "no part", *(spread(values, 3) for values in dice)]
        if left_out:
            cells.append(spread([result["leave_one_out"].get(site) for result in results], 3))
        table.add_row(site, *cells)
    return table


def robustness_table(results: Sequence[Result]) -> Table | None:
    """One row per method: what a mean hides; None for results of sites that do not differ."""
    first = results[0]
    if not first.get("hospitals"):
        return None
    table = Table(title="What the mean hides", title_justify="left")
    for heading in ("method", "site SD", "10th percentile", "failed %", "unseen", "U pt", "unseen against pooled pt"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method in methods_of(first):
        finals = [result["final"][method] for result in results]
        heads = [result["headline"].get(method, {}) for result in results]
        unseen = [statistics.fmean(final["unseen"].values()) if final.get("unseen") else None for final in finals]
        below = [head.get("U_pooled") for head in heads]
        table.add_row(
            method,
            spread([final["dice_site_sd"] for final in finals], 3),
            spread([final["dice_p10"] for final in finals], 3),
            spread([100 * final["failure_rate"] for final in finals], 1),
            spread(unseen, 3),
            spread([head.get("U") for head in heads], 1),
            spread([None if value is None else 0.0 - value for value in below], 1),
        )
    table.caption = (
        "Failed: Dice below 0.5 in any structure. U: what hospitals that took no part have less than the sites."
    )
    table.caption_justify = "left"
    return table


def spread(values: Sequence[float | None], digits: int) -> str:
    """A mean, with its standard deviation if there are several values; empty if there is none."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return ""
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def methods_of(result: Result) -> list[str]:
    """Federated methods first, then the baselines."""
    return [*result["headline"], *(name for name in ("pooled", "local") if name in result["final"])]


def unseen_of(result: Result) -> list[str]:
    """Names of the hospitals that took no part."""
    return [*dict.fromkeys(site for final in result["final"].values() for site in final.get("unseen", {}))]


def _cells(results: Sequence[Result], method: str, labels: Sequence[str]) -> list[str]:
    finals = [result["final"][method] for result in results]
    heads = [result["headline"].get(method, {}) for result in results]
    return [
        spread([final["dice_mean"] for final in finals], 3),
        spread([final["dice_worst_site"] for final in finals], 3),
        *(spread([final["labels"][label] for final in finals], 3) for label in labels),
        spread([final["hd95_mm"] for final in finals], 2),
        spread([_scaled(head.get("R"), 100) for head in heads], 1),
        *(spread([_scaled(head.get(key), 1) for head in heads], 1) for key in ("W", "G")),
    ]


def _cases(result: Result) -> int:
    cases: int = next(iter(result["final"].values()))["cases"]
    return cases


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value
