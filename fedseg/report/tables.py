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
        raise StoreError(f"{path}: no such file; `fedseg simulate` writes it when it has finished") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not a result of `fedseg simulate`: {type(error).__name__}: {error}") from error
    return result


def method_table(results: Sequence[Result]) -> Table:
    """One row per method: Dice in [0, 1], HD95 in mm, R in percent, W and G in Dice points; mean ± SD over several results."""
    first = results[0]
    labels = list(next(iter(first["final"].values()))["labels"])
    seeds = f", seeds {', '.join(str(result['seed']) for result in results)}" if len(results) > 1 else ""
    table = Table(title=f"{first['name']}{seeds}: scored on {first['test']}", title_justify="left")
    for heading in ("method", "Dice", "worst site", *labels, "HD95 mm", "R %", "W pt", "G pt"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method in _methods(first):
        finals = [result["final"][method] for result in results]
        heads = [result["headline"].get(method, {}) for result in results]
        table.add_row(
            method,
            spread([final["dice_mean"] for final in finals], 3),
            spread([final["dice_worst_site"] for final in finals], 3),
            *(spread([final["labels"][label] for final in finals], 3) for label in labels),
            spread([final["hd95_mm"] for final in finals], 2),
            spread([_scaled(head.get("R"), 100) for head in heads], 1),
            *(spread([_scaled(head.get(key), 1) for head in heads], 1) for key in ("W", "G")),
        )
    table.caption = (
        "R: share of pooled Dice. W: worst site's deficit against pooled. G: smallest gain over training alone."
    )
    table.caption_justify = "left"
    return table


def site_table(results: Sequence[Result]) -> Table:
    """One row per site: its training cases and each method's Dice."""
    first = results[0]
    methods = _methods(first)
    table = Table(title="Dice by site", title_justify="left")
    for heading in ("site", "training cases", *methods):
        table.add_column(heading, justify="left" if heading == "site" else "right")
    for site in first["sites"]:
        counts = [result["sites"][site]["training_cases"] for result in results]
        dice = [[result["final"][method]["sites"][site] for result in results] for method in methods]
        table.add_row(site, spread([float(count) for count in counts], 0), *(spread(values, 3) for values in dice))
    return table


def spread(values: Sequence[float | None], digits: int) -> str:
    """A mean, with its standard deviation if there are several values; empty if there is none."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return ""
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def _methods(result: Result) -> list[str]:
    """Federated methods first, then the baselines."""
    return [*result["headline"], *(name for name in ("pooled", "local") if name in result["final"])]


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value
