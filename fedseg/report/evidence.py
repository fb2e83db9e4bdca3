"""What the scores of a simulation say, in numbers and in plain sentences: paired by person, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedseg.case_rows import CaseRow, mean
from fedseg.metrics import bootstrap_ci
from fedseg.words import counted

Result = dict[str, Any]
FEW_PERSONS = 20
"""With fewer, intervals are wide and themselves uncertain."""


@dataclass(frozen=True)
class Difference:
    """One model minus another on the same persons, in Dice points (0.01)."""

    points: float
    low: float
    high: float
    """95 % interval, persons drawn with replacement."""

    @property
    def sure(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.points:+.1f} points (95 % interval {self.low:+.1f} to {self.high:+.1f})"


def difference(rows: Sequence[CaseRow], first: str, second: str, sites: Sequence[str]) -> Difference | None:
    """Mean Dice of `first` minus `second` over some sites; `local` stands for each site's own model. None: not comparable."""
    scores: dict[str, dict[tuple[str, str, str], float]] = {"one": {}, "two": {}}
    persons: dict[tuple[str, str, str], str] = {}
    for row in rows:
        if row.site not in sites:
            continue
        key = (row.site, row.case, row.label)
        for name, run in (("one", first), ("two", second)):
            if row.run == (f"local-{row.site}" if run == "local" else run):
                scores[name][key] = row.dice
                persons[key] = row.person
    shared = scores["one"].keys() & scores["two"].keys()
    if not shared:
        return None
    gains: dict[str, list[float]] = {}
    for key in sorted(shared):
        gains.setdefault(persons[key], []).append(100 * (scores["one"][key] - scores["two"][key]))
    low, high = bootstrap_ci(gains)
    return Difference(mean(gain for of_person in gains.values() for gain in of_person), low, high)


def interval(rows: Sequence[CaseRow], run: str, site: str) -> tuple[float, float] | None:
    """95 % interval of a run's mean Dice at a site, persons drawn with replacement; None of fewer than two persons.

    `local` stands for the site's own model.
    """
    wanted = f"local-{site}" if run == "local" else run
    dice: dict[str, list[float]] = {}
    for row in rows:
        if row.run == wanted and row.site == site:
            dice.setdefault(row.person, []).append(row.dice)
    return bootstrap_ci(dice) if len(dice) > 1 else None


def in_short(result: Result, rows: Sequence[CaseRow]) -> list[str]:
    """The outcome in sentences; the first method of the scenario speaks for the federation."""
    method = next(iter(result["headline"]))
    final, sites = result["final"], list(result["sites"])
    fed, persons = final[method], len({row.person for row in rows})
    tested = counted(persons, "person") if rows else counted(fed["cases"], "case")
    where = (
        "that no hospital had for training"
        if "no site has" in result["test"]
        else "kept for validation at the hospitals"
    )
    own = ", and each went on alone from it" if method.endswith("-personal") else ""
    sentences = [
        f"{counted(len(sites), 'hospital')} trained one network together{own} ({method}). "
        f"On {tested} {where} it reaches a mean Dice of "
        f"{fed['dice_mean']:.3f} (95 % interval {fed['dice_ci95'][0]:.3f} to {fed['dice_ci95'][1]:.3f}; 1 would be perfect)."
    ]
    sentences += _against_pooled(result, rows, method, sites)
    sentences += _against_alone(result, rows, method, sites)
    sentences += _worst(result, method)
    sentences += _best(result, rows, method, sites)
    sentences += _unseen(result, method)
    traffic = result["traffic"].get(method)
    if traffic:
        sentences.append(
            f"No volume was exchanged: each hospital sent {traffic['megabytes_up'] / len(sites):.3g} MB of weight differences in "
            f"{counted(result['rounds'], 'round')}."
        )
    return sentences


def unknown(result: Result, rows: Sequence[CaseRow]) -> list[str]:
    """What these numbers do not tell."""
    persons = len({row.person for row in rows})
    limits = [
        f"This is one run with seed {result['seed']}. Another seed gives other numbers; `fedseg results` compares several."
    ]
    if rows and persons < FEW_PERSONS:
        limits.append(
            f"Only {counted(persons, 'test person')}: the intervals are wide, and small differences cannot be seen."
        )
    if "no site has" not in result["test"]:
        limits.append(
            "Models were scored on each hospital's own validation cases: hospitals are not compared on the same persons."
        )
    if "pooled" not in result["final"]:
        limits.append("Nothing was trained on all cases in one place, so nobody knows how much federation costs.")
    if "local" not in result["final"]:
        limits.append("No hospital trained alone, so nobody knows who gains by joining.")
    if result.get("hospitals"):
        limits.append("Scanners and annotators are simulated from one data set; real ones differ in more ways.")
    limits.append("Nobody has tried these networks on patients. They are no medical device.")
    return limits


def _against_pooled(result: Result, rows: Sequence[CaseRow], method: str, sites: Sequence[str]) -> list[str]:
    found = difference(rows, method, "pooled", sites) if "pooled" in result["final"] else None
    if found is None:
        return []
    pooled, share = result["final"]["pooled"]["dice_mean"], result["headline"][method]["R"]
    verdict = "more than chance explains" if found.sure else "no more than chance explains"
    return [
        f"Had all cases been in one place, training would have reached {pooled:.3f}; "
        f"the federation keeps {100 * share:.1f} % of that. "
        f"The difference is {found}: {verdict}."
    ]


def _against_alone(result: Result, rows: Sequence[CaseRow], method: str, sites: Sequence[str]) -> list[str]:
    if "local" not in result["final"]:
        return []
    found = {site: difference(rows, method, "local", [site]) for site in sites}
    gain = [site for site, one in found.items() if one is not None and one.sure and one.points > 0]
    lose = [site for site, one in found.items() if one is not None and one.sure and one.points < 0]
    open_ones = len(sites) - len(gain) - len(lose)
    gains, losses = _names(gain, "gains", "gain", "nobody gains"), _names(lose, "loses", "lose", "nobody loses")
    sentence = f"Compared with training alone, {gains} and {losses}"
    if open_ones:
        sentence += f"; at {counted(open_ones, 'hospital')} the test persons do not tell"
    known = {site: one for site, one in found.items() if one is not None}
    farthest = max(known, key=lambda site: abs(known[site].points), default=None)
    return [f"{sentence}." + (f" The largest change is at {farthest}: {known[farthest]}." if farthest else "")]


def _worst(result: Result, method: str) -> list[str]:
    fed = result["final"][method]
    worst = fed["worst_site"]
    scanner = result.get("hospitals", {}).get(worst, {}).get("scanner")
    sentence = f"It serves {worst}{f' ({scanner})' if scanner else ''} worst: Dice {fed['dice_worst_site']:.3f}"
    pooled = result["final"].get("pooled")
    if pooled:
        sentence += f", where the pooled network reaches {pooled['sites'][worst]:.3f}"
    failed = 100 * fed["failure_rate"] if "failure_rate" in fed else None
    tail = (
        ""
        if failed is None
        else f" Over all hospitals, {failed:.1f} % of the cases have a structure with a Dice below 0.5."
    )
    return [f"{sentence}.{tail}"]


def _best(result: Result, rows: Sequence[CaseRow], method: str, sites: Sequence[str]) -> list[str]:
    """Which of several methods serves its worst hospital best."""
    heads, final = result["headline"], result["final"]
    if len(heads) < 2:
        return []
    best = max(heads, key=lambda name: final[name]["dice_worst_site"])
    of_them = f"Of {len(heads)} methods, {'it' if best == method else best} serves its worst hospital best"
    if best == method:
        return [f"{of_them}."]
    found = difference(rows, best, method, sites)
    share = heads[best].get("R")
    sentence = f"{of_them}: {final[best]['dice_worst_site']:.3f} at {final[best]['worst_site']}"
    sentence += f", with {100 * share:.1f} % of pooled in the mean" if share is not None else ""
    return [f"{sentence}." + (f" Over all hospitals it has {found} against {method}." if found else "")]


def _unseen(result: Result, method: str) -> list[str]:
    unseen = result["final"][method].get("unseen")
    if not unseen:
        return []
    head = result["headline"][method]
    sentence = (
        f"At {counted(len(unseen), 'hospital')} that took no part ({', '.join(unseen)}) it reaches {mean(unseen.values()):.3f}, "
        f"{_points(head['U'])} the mean of those that did"
    )
    if head.get("U_pooled") is not None:
        sentence += f", and {_points(head['U_pooled'])} the pooled network there"
    return [sentence + "."]


def _points(below: float) -> str:
    return f"{abs(below):.1f} points {'below' if below > 0 else 'above'}"


def _names(names: Sequence[str], one: str, many: str, none: str) -> str:
    if not names:
        return none
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{listed} {one if len(names) == 1 else many}"
