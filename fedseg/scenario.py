"""A scenario: an experiment, and the hospitals that a researcher imagines on one machine."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fedseg.comparison import Figure
from fedseg.config import Experiment
from fedseg.data.cohort import PersonRule
from fedseg.data.phantom import PhantomConfig
from fedseg.data.shift.profiles import Annotator, Scanner, Shift
from fedseg.errors import ConfigError
from fedseg.expected import Expected
from fedseg.federated.machines import MachinePlan, Machines, SimulatedMachine
from fedseg.federated.rounds import derive_seed
from fedseg.names import Name
from fedseg.sections import PositiveFloat, PositiveInt, Section, read_toml, validate_section


class SimulatedSite(Section):
    """A site with a folder of its own, or with phantoms of its own."""

    name: Name
    data: str | None = None
    """Folder with the site's cases."""
    phantom: PhantomConfig | None = None
    """Makes the site's cases: its patients, and its scanner."""
    person: PersonRule = PersonRule()

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.data is None) == (self.phantom is None):
            raise ValueError(f"site {self.name!r} needs either data or phantom")
        return self


class Partition(Section):
    """How the persons of one data set are dealt out to sites; a person never goes to two."""

    scheme: Literal["list", "sizes", "lognormal", "dirichlet"]
    """`list`: by name of case; `sizes`: random, in given proportions; `lognormal`: random, of log-normal size;
    `dirichlet`: skewed by the share of foreground in a case."""
    sites: PositiveInt | None = None
    """Number of sites, for `lognormal` and `dirichlet`."""
    names: tuple[Name, ...] | None = None
    """Names of the sites; absent: A, B, C, ..."""
    sizes: tuple[PositiveFloat, ...] | None = None
    """Relative sizes, for `sizes`."""
    sigma: PositiveFloat = 0.6
    """Spread of the sizes, for `lognormal`."""
    alpha: PositiveFloat = 0.5
    """Concentration, for `dirichlet`: 100 is even, 0.3 is very skewed."""
    minimum: PositiveInt = 3
    """Fewest persons at a site."""
    lists: dict[str, tuple[str, ...]] | None = None
    """Names of cases by site, for `list`."""

    @model_validator(mode="after")
    def _scheme_has_its_settings(self) -> Self:
        needed = {"list": "lists", "sizes": "sizes", "lognormal": "sites", "dirichlet": "sites"}[self.scheme]
        if getattr(self, needed) is None:
            raise ValueError(f"scheme {self.scheme!r} needs {needed}")
        if self.names is not None and (len(self.names) != self.count or len(set(self.names)) != len(self.names)):
            raise ValueError(f"names must be {self.count} different names, got {list(self.names)}")
        return self

    @property
    def count(self) -> int:
        """Number of sites."""
        return len(self.lists or self.sizes or ()) or self.sites or 0

    @property
    def site_names(self) -> tuple[str, ...]:
        """Names of the sites."""
        if self.lists is not None:
            return tuple(self.lists)
        return self.names or tuple(
            chr(ord("A") + index) if self.count <= 26 else f"S{index + 1:03d}" for index in range(self.count)
        )


class Source(Section):
    """One data set, dealt out to sites."""

    data: str | None = None
    """Folder; environment variables such as `${FEDSEG_HIPPOCAMPUS}` are filled in."""
    phantom: PhantomConfig | None = None
    """Instead of a folder: persons that do not exist, seen through one scanner before the hospitals' own come."""
    person: PersonRule = PersonRule()
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of persons kept aside from every site; all final models are scored on them."""
    test_seed: int = 0
    """Decides who they are, whatever the experiment's seed."""
    partition: Partition

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.data is None) == (self.phantom is None):
            raise ValueError("source needs either data or phantom")
        return self


class Hospital(Section):
    """What is special about one simulated hospital."""

    scanner: Scanner | None = None
    """In the file: the name of a profile (`fedseg data profiles`), a path to one, or a table."""
    annotator: Annotator | None = None
    """Who draws the labels that it trains on; references of validation and test stay as they are."""
    machine: SimulatedMachine | None = None
    """Its computer; absent: as `machines` says."""

    def shift(self, name: str) -> Shift | None:
        """What makes its cases its own, the same whatever the experiment's seed."""
        if self.scanner is None and self.annotator is None:
            return None
        return Shift(scanner=self.scanner, annotator=self.annotator, seed=derive_seed("hospital", name))


class Scenario(Section):
    """A federation to simulate."""

    experiment: Experiment
    """In the file: a path to an experiment's TOML, or the experiment as a table."""
    sites: tuple[SimulatedSite, ...] = ()
    """Sites with cases of their own; either these or `source`."""
    source: Source | None = None
    methods: dict[Name, dict[str, Any]] = Field(default={"federated": {}})
    """Runs to compare: name, and what replaces settings of `federation` (or, as `training.x`, of `training`)."""
    baselines: tuple[Literal["pooled", "local", "leave-one-out"], ...] = ("pooled", "local")
    """What else is trained, with as many passes over the cases; `leave-one-out`: the first method without each site."""
    personal_epochs: Annotated[int, Field(ge=0, le=1000)] = 0
    """After the last round of each method every site goes on alone for up to so many epochs, and keeps what its validation cases
    prefer: a further method, `NAME-personal`."""
    personalised: tuple[Name, ...] = ()
    """Methods that this is done with; none named: all."""
    hospitals: dict[str, Hospital] = Field(default={})
    """By name of the site: scanner, annotator and machine; sites that are not named are as their data are."""
    unseen: dict[Name, Hospital] = Field(default={})
    """Hospitals that never take part: every final model is scored on the test persons as their scanners see them."""
    machines: Machines | None = None
    """Virtual clock, deadline and absences; absent: every site answers."""
    expected: dict[str, dict[Figure, Expected]] = Field(default={})
    """By method: what came out when somebody ran it before; `fedseg simulate` says whether it did again."""

    @model_validator(mode="after")
    def _has_sites(self) -> Self:
        if bool(self.sites) == (self.source is not None):
            raise ValueError("a scenario needs either [[sites]] or [source]")
        names = [site.name for site in self.sites]
        known = names if self.source is None else list(self.source.partition.site_names)
        if strangers := sorted(set(self.hospitals) - set(known)):
            raise ValueError(f"hospitals: there is no site {strangers[0]!r}, the sites are {', '.join(known)}")
        if self.unseen and (self.source is None or not self.source.test_fraction):
            raise ValueError("unseen: needs test persons that no site has: [source] with a test_fraction above 0")
        if both := sorted(set(self.unseen) & set(known)):
            raise ValueError(f"unseen: {both[0]!r} is the name of a site that takes part")
        if moving := sorted(name for name, hospital in self.unseen.items() if hospital.annotator or hospital.machine):
            raise ValueError(f"unseen.{moving[0]}: takes no part, so it has a scanner only")
        for name, hospital in (self.hospitals | self.unseen).items():
            if hospital.scanner is not None and hospital.scanner.modality != self.experiment.task.modality:
                raise ValueError(
                    f"{name}: its scanner is for {hospital.scanner.modality}, the task is {self.experiment.task.modality}"
                )
        if "leave-one-out" in self.baselines and len(known) < 3:
            raise ValueError("baselines: leave-one-out needs three sites or more")
        if len(set(names)) != len(names):
            raise ValueError(f"every site needs a name of its own, got {names}")
        if (
            not self.methods
            or {"pooled", "local"} & set(self.methods)
            or any(name.startswith(("local-", "without-")) or name.endswith("-personal") for name in self.methods)
        ):
            raise ValueError(
                "methods needs at least one name; pooled, local, local-..., without-... and ...-personal are taken"
            )
        if strangers := sorted(set(self.personalised) - set(self.methods)):
            raise ValueError(f"personalised: there is no method {strangers[0]!r}, there are {', '.join(self.methods)}")
        if self.personalised and not self.personal_epochs:
            raise ValueError("personalised: personal_epochs says for how long, and it is 0")
        known_methods = (*self.compared, *(name for name in ("pooled", "local") if name in self.baselines))
        if strangers := sorted(set(self.expected) - set(known_methods)):
            raise ValueError(f"expected: there is no method {strangers[0]!r}, there are {', '.join(known_methods)}")
        for name in self.methods:
            try:
                self.experiment_of(name)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self

    @property
    def compared(self) -> tuple[str, ...]:
        """Names of all federated methods, with those that are personalised."""
        return (*self.methods, *(personal(method) for method in self.goes_on))

    @property
    def goes_on(self) -> tuple[str, ...]:
        """Methods after which every site goes on alone."""
        if not self.personal_epochs:
            return ()
        return tuple(method for method in self.methods if not self.personalised or method in self.personalised)

    def machine_plans(self, sites: Sequence[str]) -> dict[str, MachinePlan]:
        """What each site's machine does, by name; none unless the scenario speaks of machines."""
        own = {name: hospital.machine for name, hospital in self.hospitals.items() if hospital.machine is not None}
        if self.machines is None and not own:
            return {}
        common = self.machines or Machines()
        return {name: common.of(name, own.get(name)) for name in sites}

    def experiment_of(self, method: str) -> Experiment:
        """The experiment with a method's settings in it.

        Raises:
            ConfigError: a setting does not exist or does not fit.
        """
        document = self.experiment.model_dump(mode="json")
        for key, value in self.methods.get(method, {}).items():
            section, _, name = key.rpartition(".")
            if section and not isinstance(document.get(section), dict):
                raise ConfigError(f"methods.{method}: {key}: the experiment has no section {section!r}")
            document[section or "federation"][name] = value
        return validate_section(Experiment, json.dumps(document), source=f"methods.{method}")


def personal(method: str) -> str:
    """Name of a method of which every site has gone on alone."""
    return f"{method}-personal"


def load_scenario(path: Path, *, seed: int | None = None, rounds: int | None = None) -> Scenario:
    """Read a scenario; paths in it are relative to its file.

    Args:
        path: the TOML file.
        seed: replaces the experiment's seed.
        rounds: replaces the experiment's number of rounds.

    Raises:
        ConfigError: the file or its experiment is wrong.
    """
    document = read_toml(path)
    home = path.parent
    if isinstance(document.get("experiment"), str):
        home = (path.parent / document["experiment"]).parent
        document["experiment"] = read_toml(path.parent / document["experiment"])
    if isinstance(document.get("experiment"), dict):
        if seed is not None:
            document["experiment"]["seed"] = seed
        if rounds is not None:
            document["experiment"].setdefault("federation", {})["rounds"] = rounds
            document.pop("expected", None)  # it is about as many rounds as the file says
    scenario = validate_section(Scenario, json.dumps(document, default=str), source=str(path), folder=path.parent)
    base = path.resolve().parent
    updates: dict[str, Any] = {"experiment": scenario.experiment.located(home)}
    if scenario.source is not None and scenario.source.data is not None:
        updates["source"] = scenario.source.model_copy(update={"data": str(base / _expand(scenario.source.data, path))})
    updates["sites"] = tuple(
        site.model_copy(update={"data": str(base / _expand(site.data, path))}) if site.data else site
        for site in scenario.sites
    )
    return scenario.model_copy(update=updates)


def _expand(data: str, path: Path) -> str:
    expanded = os.path.expandvars(data)
    if "$" in expanded:
        raise ConfigError(
            f"{path}: data = {data!r} needs an environment variable that is not set; set it to the folder"
        )
    return str(Path(expanded).expanduser())
