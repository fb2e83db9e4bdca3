"""Tables of one study: intervals, paired differences, and what its file expects."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from fedseg.comparison import FIGURES
from fedseg.errors import ConfigError
from fedseg.expected import against_expected
from fedseg.report.tables import Result
from fedseg.robustness.resampling import Estimate
from fedseg.study import Study


def interval_table(study: Study) -> Table:
    """One row per method: its figures with 95 % intervals."""
    table = Table(title="With 95 % intervals", title_justify="left")
    shown = [figure for figure in FIGURES if any(figure in found for found in study.figures.values())]
    sent = {method: _megabytes(study.results, method) for method in study.methods}
    traffic = ["MB per site\nto 95 % of pooled"] if any(sent.values()) else []
    for heading in ("method", *(FIGURES[figure][0] for figure in shown), *traffic):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, found in study.figures.items():
        cells = (interval(found[figure], FIGURES[figure][1]) if figure in found else "" for figure in shown)
        table.add_row(method, *cells, *([sent[method]] if traffic else []))
    seeds = f" in each of {len(study.results)} seeds" if len(study.results) > 1 else ""
    table.caption = f"Intervals: the same figures of persons drawn with replacement{seeds}." + (
        " MB, up and down: until the validation Dice had 95 % of the pooled model's." if traffic else ""
    )
    table.caption_justify = "left"
    return table


def difference_table(study: Study, against: Sequence[str] | None = None) -> Table | None:
    """One row per method: the paired difference in Dice points to some references; None if there is nothing to compare.

    Args:
        study: the results.
        against: methods, `pooled` or `local`; absent: the first method and these two.

    Raises:
        ConfigError: a reference is not in the study.
    """
    if strangers := sorted(set(against or ()) - set(study.methods)):
        raise ConfigError(f"--against {strangers[0]}: there is no such method; there are {', '.join(study.methods)}")
    references = list(dict.fromkeys(against or (study.methods[0], "pooled", "local")))
    found = study.differences(references)
    if not found:
        return None
    table = Table(title="Differences at the sites, Dice points, person by person", title_justify="left")
    shown = [reference for reference in references if any(other == reference for _, other in found)]
    for heading in ("method", *(f"against {reference}" for reference in shown)):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method in study.methods:
        cells = [_difference(found.get((method, reference))) for reference in shown]
        if any(cells):
            table.add_row(method, *cells)
    persons = max(pair["persons"] for pair in found.values())
    test = "Wilcoxon's signed-rank test, corrected for the number of comparisons (Holm)"
    table.caption = f"{persons} persons; 95 % intervals; p: {test}."
    table.caption_justify = "left"
    return table


def expected_table(results: Sequence[Result]) -> Table | None:
    """What the scenario's file expects and what came out; None if it expects nothing."""
    outcomes = against_expected(results)
    if not outcomes:
        return None
    table = Table("method", "figure", title="Expected by the scenario's file", title_justify="left")
    for heading in ("expected", "found"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for outcome in outcomes:
        *cells, verdict = outcome.words
        table.add_row(*cells, verdict if outcome.met else f"[bold red]{verdict}[/]")
    return table


def interval(found: Estimate, digits: int) -> str:
    """A figure and, below it, its interval; empty if it is not defined."""
    value, ends = found["value"], found["ci95"]
    if not isinstance(value, float) or not isinstance(ends, list):
        return ""
    return f"{value:.{digits}f}\n[dim]{ends[0]:.{digits}f} to {ends[1]:.{digits}f}[/]"


def _difference(pair: dict[str, Any] | None) -> str:
    if pair is None:
        return ""
    (value, ends), p = (pair["difference"][key] for key in ("value", "ci95")), pair["p_holm"]
    return f"{value:+.1f} ({ends[0]:+.1f} to {ends[1]:+.1f}), " + ("p < 0.001" if p < 0.001 else f"p {p:.3f}")


def _megabytes(results: Sequence[Result], method: str) -> str:
    """Empty if nothing was pooled, or for results from before this was counted."""
    reached = [traffic["to_95"] for result in results if "to_95" in (traffic := result["traffic"].get(method, {}))]
    known = [when["megabytes_per_site"] for when in reached if when is not None]
    if len(known) < len(reached):
        return f"never in {len(reached) - len(known)} of {len(reached)} seeds" if known else "never"
    return f"{sum(known) / len(known):.1f}" if known else ""
