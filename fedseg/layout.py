"""Who has which cases in a simulation: phantoms are made, data sets dealt out by person."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from fedseg.data.cohort import Case, Cohort, read_cohort, split_by_person
from fedseg.data.phantom import write_phantoms
from fedseg.errors import ConfigError
from fedseg.federated.rounds import derive_seed
from fedseg.scenario import Partition, Scenario, SimulatedSite
from fedseg.sections import Section
from fedseg.site.config import SiteConfig, default_cache


class Layout(Section):
    """Who has which cases in a simulation."""

    sites: tuple[SiteConfig, ...]
    """Every site with its cases for training and validation."""
    test: SiteConfig | None = None
    """Cases that no site has; absent: models are scored on the sites' validation cases."""
    views: dict[str, SiteConfig] = Field(default={})
    """The cases of `test` as each hospital's scanner sees them, by its name: of the sites, then of the unseen hospitals."""

    @property
    def unseen(self) -> tuple[str, ...]:
        """Names of hospitals that take no part."""
        names = {site.name for site in self.sites}
        return tuple(name for name in self.views if name not in names)

    def scored_on(self, site: str) -> SiteConfig | None:
        """The cases on which models are scored for a hospital; None: the site's own validation cases."""
        return self.views.get(site, self.test)


def lay_out(
    scenario: Scenario, output: Path, *, device: str = "cpu", threads: int = 1, progress: bool = False
) -> Layout:
    """Make the phantoms, or deal out the data set.

    Args:
        scenario: what to simulate.
        output: the result directory; phantoms go to `output/data/<site>`.
        device: for all sites.
        threads: for all sites.
        progress: show a bar.

    Raises:
        DataError: a folder holds no cohort.
        ConfigError: there are too few persons for the partition.
    """
    common: dict[str, Any] = {"cache": default_cache(), "device": device, "threads": threads}
    shifts = {name: hospital.shift(name) for name, hospital in scenario.hospitals.items()}
    if scenario.source is None:
        folders = (_own_folder(site, output, common, progress) for site in scenario.sites)
        return Layout(sites=tuple(site.model_copy(update={"shift": shifts.get(site.name)}) for site in folders))
    source = scenario.source
    folder = Path(source.data) if source.data else output / "data"
    if source.phantom is not None and not (folder / "dataset.json").exists():
        write_phantoms(folder, source.phantom, progress=progress)
    cohort = read_cohort(folder, source.person)
    rest, test = split_by_person(cohort, source.test_fraction, source.test_seed)
    shares = deal_out(rest, source.partition, scenario.experiment.seed)
    common |= {"data": str(folder), "person": source.person}
    sites = tuple(
        SiteConfig(name=name, cases=cases, shift=shifts.get(name), **common) for name, cases in shares.items()
    )
    if not test.cases:
        return Layout(sites=sites)
    kept = SiteConfig(name="test", cases=tuple(case.name for case in test.cases), **common)
    scanners = {site.name: site.shift for site in sites}
    scanners |= {name: hospital.shift(name) for name, hospital in scenario.unseen.items()}
    views = {
        name: kept.model_copy(update={"name": name, "shift": shift and shift.for_scoring})
        for name, shift in scanners.items()
    }
    return Layout(sites=sites, test=kept, views=views)


def deal_out(cohort: Cohort, partition: Partition, seed: int) -> dict[str, tuple[str, ...]]:
    """Deal out the persons of a cohort.

    Returns:
        Names of cases by site.

    Raises:
        ConfigError: a listed case does not exist or its person is at two sites, or there are too few persons.
    """
    persons = cohort.persons()
    if partition.scheme == "list":
        assert partition.lists is not None
        return _listed(cohort, partition.lists)
    if len(persons) < partition.count * partition.minimum:
        raise ConfigError(
            f"{cohort.root}: {len(persons)} persons are too few for {partition.count} sites of at least {partition.minimum}; "
            "set partition.minimum or partition.sites lower"
        )
    generator = np.random.default_rng(derive_seed(seed, "partition"))
    names = sorted(persons)
    if partition.scheme == "dirichlet":
        groups = _dirichlet(names, [_foreground(persons[name]) for name in names], partition, generator)
    else:
        sizes = partition.sizes or generator.lognormal(0.0, partition.sigma, partition.count)
        order = generator.permutation(len(names))
        bounds = np.cumsum([0, *_counts(sizes, len(names), partition.minimum)])
        groups = [[names[index] for index in order[low:high]] for low, high in itertools.pairwise(bounds)]
    return {
        site: tuple(sorted(case.name for person in group for case in persons[person]))
        for site, group in zip(partition.site_names, groups, strict=True)
    }


def _own_folder(site: SimulatedSite, output: Path, common: dict[str, Any], progress: bool) -> SiteConfig:
    folder = Path(site.data) if site.data else output / "data" / site.name
    if site.phantom is not None and not (folder / "dataset.json").exists():
        write_phantoms(folder, site.phantom, progress=progress)
    return SiteConfig(name=site.name, data=str(folder), person=site.person, **common)


def _listed(cohort: Cohort, lists: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    persons = {case.name: case.person for case in cohort.cases}
    owner: dict[str, str] = {}
    for site, names in lists.items():
        for name in names:
            if name not in persons:
                raise ConfigError(f"partition.lists.{site}: {cohort.root} has no case {name!r}")
            if owner.setdefault(persons[name], site) != site:
                raise ConfigError(
                    f"partition.lists: case {name!r} puts one person at two sites, {owner[persons[name]]} and {site}"
                )
    return lists


def _counts(sizes: Any, total: int, minimum: int) -> list[int]:
    """Whole numbers in proportion to `sizes`, at least `minimum` each, with the given total."""
    shares = np.asarray(sizes, float) / np.sum(sizes)
    counts = np.maximum(minimum, np.floor(shares * total)).astype(int)
    while counts.sum() != total:
        gap = shares * total - counts
        if counts.sum() < total:
            counts[int(np.argmax(gap))] += 1
        else:
            counts[int(np.argmin(np.where(counts > minimum, gap, math.inf)))] -= 1
    return [int(count) for count in counts]


def _dirichlet(
    names: list[str], foreground: list[float], partition: Partition, generator: np.random.Generator
) -> list[list[str]]:
    """Deal out tertiles of foreground share in Dirichlet proportions; sites below the minimum then take from the largest."""
    groups: list[list[str]] = [[] for _ in range(partition.count)]
    for tertile in np.array_split(np.argsort(foreground, kind="stable"), 3):
        members = generator.permutation(tertile)
        bounds = np.cumsum([0, *_counts(generator.dirichlet([partition.alpha] * partition.count), len(members), 0)])
        for group, low, high in zip(groups, bounds, bounds[1:], strict=False):
            group.extend(names[index] for index in members[low:high])
    for group in groups:
        while len(group) < partition.minimum:
            group.append(max(groups, key=len).pop())
    return groups


def _foreground(cases: tuple[Case, ...]) -> float:
    """Mean share of labelled voxels in a person's readable cases; 0 if none is."""
    from fedseg.data.volume import read_label
    from fedseg.errors import CaseError

    shares = []
    for case in cases:
        if case.label is not None:
            try:
                shares.append(float(np.mean(read_label(case.label).array > 0)))
            except CaseError:
                continue
    return float(np.mean(shares)) if shares else 0.0
