"""The same cases as different hospitals see them: what robustness is measured on."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedseg.config import Experiment
from fedseg.data.cohort import Case, read_cohort
from fedseg.data.shift.profiles import Shift, single_effect
from fedseg.federated.site import Site
from fedseg.layout import Layout
from fedseg.site.config import SiteConfig

CLEAN = "clean"


@dataclass(frozen=True)
class View:
    """Cases through one scanner."""

    name: str
    """Of the hospital; `clean`; or effect and severity, as in `noise 3`."""
    kind: Literal["site", "unseen", "clean", "effect"]
    cases: tuple[Case, ...]
    shift: Shift | None = None
    effect: str = ""
    severity: int = 0

    @property
    def key(self) -> str:
        """Changes with the files and with what is done to them; views of equal keys are the same."""
        recipe = None if self.shift is None else self.shift.recipe()
        files = [(case.name, [_stamp(path) for path in (*case.images, case.label)]) for case in self.cases]
        return hashlib.sha256(json.dumps([recipe, files]).encode()).hexdigest()[:16]


def hospital_views(layout: Layout, experiment: Experiment) -> list[View]:
    """What each hospital sees: sites first, then those that took no part.

    The shared test persons if the simulation kept some aside, else each site's own validation cases.
    """
    views = []
    for site in layout.sites:
        config = layout.scored_on(site.name)
        cases = _validation_cases(site, experiment) if config is None else Site(config).cohort().cases
        shift = (config or site).shift
        views.append(View(site.name, "site", cases, shift and shift.for_scoring))
    for name in layout.unseen:
        config = layout.views[name]
        views.append(View(name, "unseen", Site(config).cohort().cases, config.shift and config.shift.for_scoring))
    return views


def clean_view(layout: Layout, experiment: Experiment) -> View:
    """The test cases as their files are; without shared ones, every site's validation cases."""
    if layout.test is not None:
        return View(CLEAN, "clean", Site(layout.test).cohort().cases)
    cases = [
        replace(case, name=f"{site.name}/{case.name}")
        for site in layout.sites
        for case in _validation_cases(site, experiment)
    ]
    return View(CLEAN, "clean", tuple(cases))


def effect_views(clean: View, effects: Iterable[str], severities: Sequence[int]) -> list[View]:
    """The clean cases under each effect, at each severity."""
    return [
        View(
            name=f"{effect} {severity}",
            kind="effect",
            cases=clean.cases,
            shift=Shift(scanner=single_effect(effect, severity)),
            effect=effect,
            severity=severity,
        )
        for effect in effects
        for severity in severities
    ]


def _validation_cases(site: SiteConfig, experiment: Experiment) -> tuple[Case, ...]:
    """Of one site; its persons are named after it, since another site may number its own alike."""
    usable = {case.name for case in Site(site).prepare(experiment).validation.cases}
    cohort = read_cohort(Path(site.data), site.person)
    return tuple(replace(case, person=f"{site.name}/{case.person}") for case in cohort.subset(usable).cases)


def _stamp(path: Path | None) -> tuple[str, int, int] | None:
    if path is None or not path.is_file():
        return None
    about = path.stat()
    return str(path), about.st_size, about.st_mtime_ns
