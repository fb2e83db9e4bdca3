"""The content of a report on a run: of a simulation all that it left; of a study in progress what its run store tells."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedseg.case_rows import CaseRow, read_scores
from fedseg.coordinator.history import RoundStory, RunSummary, find_runs, rounds_of
from fedseg.coordinator.state import reader
from fedseg.errors import ConfigError, StoreError
from fedseg.expected import against_expected
from fedseg.report import figures, robustness_figures
from fedseg.report.document import Block, Bullets, Charts, Code, Facts, Paragraph, Photo, Report, Section, Table
from fedseg.report.drawing import drawing_of
from fedseg.report.evidence import Result, difference, in_short, interval, unknown
from fedseg.report.provenance import software_of
from fedseg.report.round_charts import round_charts
from fedseg.report.tables import CAPTION, load_result
from fedseg.words import counted

HOW = (
    "Intervals in brackets: 95 %, from 2000 draws of a hospital's test persons with replacement (percentile bootstrap); a "
    "person's cases are drawn together."
)


def report_on(directory: Path, method: str | None = None) -> Report:
    """The report on a run directory.

    Args:
        directory: a result directory of `fedseg simulate`, finished or not, or the run directory of a study.
        method: which one of a simulation speaks for the federation; absent: the first.

    Raises:
        StoreError: it holds no run.
        ConfigError: it has no such method.
    """
    runs = [run for run in find_runs(directory) if Path(run.directory) == directory]
    if not runs:
        raise StoreError(f"{directory}: holds no run store (store.sqlite); name a result directory")
    if not (directory / "result.json").exists():
        return _on_rounds(directory, runs)
    result, scores = _led_by(method, load_result(directory)), directory / "scores.csv"
    rows = read_scores(scores) if scores.exists() else []
    sections = [
        Section("In short", [Paragraph(" ".join(in_short(result, rows)[:1])), Bullets(in_short(result, rows)[1:])]),
        Section("Who does how well", _hospitals(result, rows)),
        Section("Methods compared", _methods(result, rows)),
        Section("Rounds", _rounds(directory, result, runs)),
        *_robustness(directory),
        *_cases(directory, result),
        Section("Study card", _card(directory, result, runs)),
        Section("What is not known", [Bullets(unknown(result, rows))]),
        Section("Do it again", [Code(_again(directory, result))]),
    ]
    subtitle = f"A simulation of {_when(max(run.finished or run.started for run in runs))}"
    return Report(f"{result['name']}: a simulated federation", subtitle, sections)


# ------------------------------------------------------------------------------------------------- of a simulation
def _led_by(method: str | None, result: Result) -> Result:
    """The result with a method in front of the others."""
    heads = result["headline"]
    if method is None:
        return result
    if method not in heads:
        raise ConfigError(f"--method {method}: there is no such method; there are {', '.join(heads)}")
    return result | {"headline": {method: heads[method]} | heads}


def _hospitals(result: Result, rows: Sequence[CaseRow]) -> list[Block]:
    method, hospitals = next(iter(result["headline"])), result.get("hospitals", {})
    final, left_out = result["final"], result.get("leave_one_out", {})
    kinds = [kind for kind in ("scanner", "annotator") if any(one.get(kind) for one in hospitals.values())]
    head = ["hospital", *kinds, "training cases", f"Dice, {method}", "alone", "pooled", "without it"]
    words = 1 + len(kinds)
    unseen = final[method].get("unseen", {})
    scored, compared = [], []
    for site in (*result["sites"], *unseen):
        part, own = ("unseen", "takes no part") if site in unseen else ("sites", "")
        row = [site, *_words(hospitals.get(site, {}), kinds), own or str(result["sites"][site]["training_cases"])]
        for name in (method, "local", "pooled"):
            row.append(_with_interval(final.get(name, {}).get(part, {}).get(site), interval(rows, name, site)))
        scored.append([*row, _number(left_out.get(site))])
        compared.append([site, *(_interval(difference(rows, method, name, [site])) for name in ("local", "pooled"))])
    gains = _without_empty(
        "What joining changes, in Dice points (0.01); the same persons, in pairs",
        ["hospital", f"{method} minus alone", f"{method} minus pooled"],
        compared,
    )
    drawn = figures.sites_figure(result)
    words_of_it = "; ".join(f"{row[0]}: {row[words + 1]}" for row in scored)
    return [
        Charts(
            [drawing_of(drawn)],
            "Mean Dice of every method at every hospital.",
            [f"Bars of mean Dice. {method}: {words_of_it}."],
        ),
        _without_empty(f"Dice at every hospital ({result['test']})", head, scored, words),
        *([gains] if len(gains.head) > 1 else []),
        *([Paragraph(HOW)] if rows else []),
    ]


def _methods(result: Result, rows: Sequence[CaseRow]) -> list[Block]:
    first, sites = next(iter(result["headline"])), list(result["sites"])
    labels = list(result["final"][first]["labels"])
    head = [
        "method",
        "Dice",
        "95 % interval",
        "worst hospital",
        *labels,
        "HD95, mm",
        "R, %",
        "W",
        "G",
        f"against {first}",
    ]
    table = []
    for method in [*result["headline"], *(name for name in ("pooled", "local") if name in result["final"])]:
        final, marks = result["final"][method], result["headline"].get(method, {})
        row = [method, f"{final['dice_mean']:.3f}", "{:.3f} to {:.3f}".format(*final["dice_ci95"])]
        row += [f"{final['dice_worst_site']:.3f}", *(f"{final['labels'][label]:.3f}" for label in labels)]
        row += [f"{final['hd95_mm']:.2f}", _number(marks.get("R"), 100, 1), _number(marks.get("W"), 1, 1)]
        row += [
            _number(marks.get("G"), 1, 1),
            "" if method == first else _interval(difference(rows, method, first, sites)),
        ]
        table.append(row)
    return [
        _without_empty("Methods, on the same persons; the last column in Dice points", head, table),
        Paragraph(f"{CAPTION} W and G in Dice points (0.01)."),
        *_expected(result),
    ]


def _expected(result: Result) -> list[Block]:
    rows = [[*outcome.words] for outcome in against_expected([result])]
    head = ["method", "figure", "expected", "found", ""]
    return [Table("What the scenario's file expects, from earlier runs", head, rows, 2)] if rows else []


def _rounds(directory: Path, result: Result, runs: Sequence[RunSummary]) -> list[Block]:
    known = {run.run: run for run in runs}
    head = ["method", "rounds", "updates", "late or failed", "minutes", "MB up in all", "resumed"]
    table = []
    for method in result["headline"]:
        if method not in known:
            continue
        stories = rounds_of(directory, method)
        table.append(
            [
                method,
                str(len(stories)),
                str(sum(story.accepted for story in stories)),
                str(sum(len(story.failures) for story in stories)),
                f"{sum(story.seconds for story in stories) / 60:.1f}",
                f"{sum(story.megabytes for story in stories):.1f}",
                str(known[method].resumed or ""),
            ]
        )
    drawn = figures.curves_figure(directory, result)
    colours = {method: colour for method, colour in figures.method_colours(result).items() if method in known}
    colours.pop("pooled", None)  # it has no hospitals
    return [
        Charts(
            [drawing_of(drawn)],
            "Mean Dice on the hospitals' validation cases.",
            ["Curves of mean validation Dice over the rounds."],
        ),
        *round_charts(directory, colours, list(result["sites"]), alone="local" in result["final"]),
        _without_empty("What the rounds took", head, table),
    ]


def _robustness(directory: Path) -> list[Section]:
    path = directory / "robustness.json"
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: not readable: {error}; `fedseg evaluate --robustness` writes it anew") from error
    drawn = [
        (
            "cross_site",
            robustness_figures.cross_site_figure,
            "Every network (rows) on every hospital's test images (columns).",
        ),
        (
            "grid",
            robustness_figures.severity_figure,
            "Mean Dice under each effect, from slight (1) to destructive (5).",
        ),
        ("calibration", robustness_figures.reliability_figure, "How sure networks are, and how often they are right."),
    ]
    blocks: list[Block] = [
        Charts([drawing_of(draw(document))], text, [text]) for part, draw, text in drawn if document.get(part)
    ]
    return [Section("Robustness", blocks)] if blocks else []


def _cases(directory: Path, result: Result) -> list[Section]:
    there = directory / "segmentations.png"
    fresh = there.exists() and there.stat().st_mtime >= (directory / "result.json").stat().st_mtime
    if not fresh and not (directory / "scores.csv").exists():  # which cases to show, nobody knows
        return []
    photo = Photo(
        figures.photo(there if fresh else figures.segmentations_figure(directory, result)),
        "Test cases: the reference, and what networks make of the image. Simulated or public data only.",
        "Sections of test cases with outlines of the structures.",
    )
    return [Section("What it looks like", [photo])]


def _card(directory: Path, result: Result, runs: Sequence[RunSummary]) -> list[Block]:
    scenario = json.loads((directory / "scenario.json").read_text(encoding="utf-8"))
    experiment = scenario["experiment"]
    federation, training, model = experiment["federation"], experiment["training"], result["model"]
    quarantined: Counter[str] = Counter()
    for counts in result["sites"].values():
        quarantined.update(counts["quarantined"])
    lost = ", ".join(f"{count} {reason}" for reason, count in quarantined.items()) or "none"
    minutes = sum((run.finished or run.started) - run.started for run in runs) / 60
    facts = [
        ("structures", ", ".join(name for name in experiment["task"]["labels"] if name != "background")),
        ("modality", experiment["task"]["modality"].upper()),
        ("hospitals", str(len(result["sites"]))),
        ("training cases", str(sum(counts["training_cases"] for counts in result["sites"].values()))),
        ("validation cases", str(sum(counts["validation_cases"] for counts in result["sites"].values()))),
        ("cases set aside", lost),
        ("network", f"{model['name']} {model['preset'] or ''}".strip()),
        ("patch", " x ".join(map(str, training["patch_size"]))),
        ("optimizer", f"{training['optimizer']}, learning rate {training['learning_rate']:g}, {training['schedule']}"),
        ("rounds", f"{federation['rounds']} of {counted(federation['local_epochs'], 'local epoch')}"),
        ("seed", str(result["seed"])),
        ("experiment", result["experiment_digest"][:16]),
        ("begun", _when(min(run.started for run in runs))),
        ("computed", f"{counted(round(minutes), 'minute')}, summed over runs"),
        ("software of the run", software_of(directory)),
    ]
    blocks: list[Block] = [Facts(facts)]
    if scenario.get("machines"):
        told = ", ".join(
            f"{key} {value}" for key, value in scenario["machines"].items() if value not in (None, False, 0.0)
        )
        blocks.append(Paragraph(f"Machines on a virtual clock: {told}."))
    changed = [f"{name}: {_settings(settings)}" for name, settings in scenario["methods"].items() if settings]
    if changed:
        blocks.append(Bullets(changed))
    return blocks


def _again(directory: Path, result: Result) -> str:
    name = shlex.quote(directory.resolve().name)  # the folders above it are nobody's business
    return (
        "# the scenario with all its settings is scenario.json, beside the scores\n"
        f"fedseg simulate SCENARIO.toml --seed {result['seed']} --output {name}\n"
        f"fedseg evaluate --robustness {name}\n"
        f"fedseg report {name}"
    )


# ------------------------------------------------------------------------------------- of a study, or half a simulation
def _on_rounds(directory: Path, runs: Sequence[RunSummary]) -> Report:
    """A report without a case: what the sites have sent."""
    main = next((run for run in runs if run.run == "federated"), runs[0])
    stories = rounds_of(directory, main.run)
    sections = [
        Section("In short", [Paragraph(_progress(main, stories))]),
        Section("Rounds", _told(directory, main, stories)),
        Section("Hospitals", _answers(directory, main)),
        Section("What is not known", [Bullets(_open_questions())]),
    ]
    state = "finished" if main.finished is not None else f"after round {main.rounds} of {main.planned}"
    return Report(f"{main.study}: {state}", f"Report of {_when(_now())}", sections)


def _progress(run: RunSummary, stories: Sequence[RoundStory]) -> str:
    text = (
        f"{counted(run.sites, 'hospital trains', 'hospitals train')} {run.model} together. "
        f"Finished: {run.rounds} of {counted(run.planned, 'round')}"
        f"{'' if run.finished is None else ', and the final weights are scored'}."
    )
    if run.dice is not None:
        text += f" The mean Dice of the newest scored weights on the hospitals' own validation cases is {run.dice:.3f}"
        text += f"; the best so far was {run.best:.3f}." if run.best is not None else "."
    failed = sum(len(story.failures) for story in stories)
    text += (
        f" {counted(failed, 'request was', 'requests were')} not answered with an update."
        if failed
        else " Every request was answered with an update."
    )
    return text + (f" The run was interrupted and resumed {counted(run.resumed, 'time')}." if run.resumed else "")


def _told(directory: Path, run: RunSummary, stories: Sequence[RoundStory]) -> list[Block]:
    head = ["round", "hospitals", "cases", "loss", "Dice", "worst", "MB", "seconds", "what went wrong"]
    table = [
        [
            str(story.server_round),
            f"{story.accepted} of {story.asked}",
            str(story.cases),
            _number(story.loss),
            _number(story.dice),
            _number(story.worst),
            f"{story.megabytes:.1f}",
            f"{story.seconds:.1f}",
            ", ".join(story.failures),
        ]
        for story in stories
    ]
    drawn = figures.run_figure(directory, run.run)
    chart = Charts(
        [drawing_of(drawn)],
        "Mean Dice on the hospitals' validation cases.",
        ["Curve of mean validation Dice over the rounds."],
    )
    told = Facts([("software of the server", software_of(directory))])
    charts = round_charts(directory, {run.run: figures.COLOURS[0]}, _sites(directory, run))
    return (
        [chart, *charts, Table("Round by round", head, table), told]
        if table
        else [Paragraph("No round is finished yet.")]
    )


def _sites(directory: Path, run: RunSummary) -> list[str]:
    with reader(directory) as store:
        return [row["site"] for row in store("SELECT DISTINCT site FROM updates WHERE run = ? ORDER BY site", run.run)]


def _answers(directory: Path, run: RunSummary) -> list[Block]:
    with reader(directory) as store:
        rows = store(
            "SELECT site, status, COALESCE(reason, '') AS reason, COUNT(*) AS n, MAX(num_cases) AS cases, "
            "SUM(bytes) AS bytes FROM updates WHERE run = ? GROUP BY site, status, reason ORDER BY site, status",
            run.run,
        )
        dice = store("SELECT site, value FROM metrics WHERE run = ? AND name = 'dice' ORDER BY server_round", run.run)
    newest: dict[str, float] = {row["site"]: row["value"] for row in dice}
    table: list[list[str]] = []
    for site in dict.fromkeys(row["site"] for row in rows):
        own = [row for row in rows if row["site"] == site]
        accepted = sum(row["n"] for row in own if row["status"] == "accepted")
        others = ", ".join(
            f"{row['n']} {row['status']} ({row['reason']})" for row in own if row["status"] != "accepted"
        )
        cases = max((row["cases"] or 0 for row in own), default=0)
        megabytes = sum(row["bytes"] or 0 for row in own) / 1e6
        table.append([site, others, str(cases), str(accepted), f"{megabytes:.1f}", _number(newest.get(site))])
    return [Table("What each hospital sent", ["hospital", "no update", "cases", "updates", "MB", "Dice"], table, 2)]


def _open_questions() -> list[str]:
    return [
        "Each hospital is scored on its own validation cases; hospitals are not compared on the same persons.",
        "Nobody has trained alone or on all cases in one place here, so the gain by joining is not known.",
        "Nobody has tried these networks on patients. They are no medical device.",
    ]


# ---------------------------------------------------------------------------------------------------------- small words
def _number(value: float | None, factor: float = 1.0, digits: int = 3) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"


def _with_interval(value: float | None, ends: tuple[float, float] | None) -> str:
    return _number(value) if value is None or ends is None else f"{value:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"


def _interval(found: Any) -> str:
    return "" if found is None else f"{found.points:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def _without_empty(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> Table:
    """A table without the columns in which nothing stands."""
    kept = [n for n in range(len(head)) if n < words or any(row[n] for row in rows)]
    return Table(caption, [head[n] for n in kept], [[row[n] for n in kept] for row in rows], words)


def _words(hospital: dict[str, Any], kinds: Sequence[str]) -> list[str]:
    return [hospital.get(kind) or "" for kind in kinds]


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in settings.items())


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _now() -> float:
    return datetime.now(UTC).timestamp()
