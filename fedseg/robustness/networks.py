"""The final networks of a simulation, and which of them stands for whom at which hospital."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedseg.errors import ConfigError
from fedseg.layout import Layout
from fedseg.model_file import model_path, read_model_file, site_model_path
from fedseg.scenario import Scenario
from fedseg.simulation import without

LOCAL, POOLED, LEFT_OUT = "local", "pooled", "leave-one-out"


@dataclass(frozen=True)
class Network:
    """One model file."""

    path: Path
    sha256: str

    @classmethod
    def at(cls, path: Path) -> "Network":
        """The file, and what it holds.

        Raises:
            ModelError: it is no model file.
        """
        read_model_file(path)
        return cls(path, hashlib.sha256(path.read_bytes()).hexdigest())


@dataclass(frozen=True)
class Row:
    """One line of the cross-site matrix: which network segments a hospital's cases.

    Where every site has a network of its own, a hospital that took no part would get one of them: its scores are their mean.
    """

    name: str
    kind: Literal["method", "pooled", "local", "leave-one-out", "single"]
    """`single`: one network everywhere that is only one site's, or that one site is missing from."""
    everywhere: tuple[Network, ...]
    at_home: Mapping[str, Network]
    """By site; absent: `everywhere`."""

    def at(self, hospital: str) -> tuple[Network, ...]:
        """The networks whose mean counts there; none if the row has nothing to say about it."""
        home = self.at_home.get(hospital)
        return self.everywhere if home is None else (home,)


def rows_of(output: Path, scenario: Scenario, layout: Layout, methods: Sequence[str] | None = None) -> list[Row]:
    """All rows of a finished simulation.

    Args:
        output: its result directory.
        scenario: what was simulated.
        layout: its sites.
        methods: federated methods to be compared; None: all.

    Raises:
        ConfigError: there is no such method.
        ModelError: a model file is missing or damaged.
    """
    names = [site.name for site in layout.sites]
    if strangers := sorted(set(methods or ()) - set(scenario.compared)):
        raise ConfigError(f"{output}: has no method {strangers[0]!r}; it has {', '.join(scenario.compared)}")
    rows, personal = [], []
    for method in scenario.compared if methods is None else methods:
        own = {site: path for site in names if (path := site_model_path(output, method, site)).exists()}
        at_home = {site: Network.at(path) for site, path in own.items()}
        common = tuple(at_home.values()) or (Network.at(model_path(output, method)),)
        rows.append(Row(method, "method", common, at_home))
        personal += [Row(f"{method}/{site}", "single", (network,), {}) for site, network in at_home.items()]
    if POOLED in scenario.baselines:
        rows.append(Row(POOLED, "pooled", (Network.at(model_path(output, POOLED)),), {}))
    locals_ = _runs(output, names, "local-") if LOCAL in scenario.baselines else {}
    fewer = _runs(output, names, without("")) if LEFT_OUT in scenario.baselines else {}
    if locals_:
        rows.append(Row("local", "local", (), locals_))
    if fewer:
        rows.append(Row("leave-one-out", "leave-one-out", (), fewer))
    rows += personal
    rows += [Row(f"local-{site}", "single", (network,), {}) for site, network in locals_.items()]
    rows += [Row(without(site), "single", (network,), {}) for site, network in fewer.items()]
    return rows


def _runs(output: Path, sites: Sequence[str], prefix: str) -> dict[str, Network]:
    return {site: Network.at(model_path(output, f"{prefix}{site}")) for site in sites}
