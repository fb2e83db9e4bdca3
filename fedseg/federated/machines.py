"""Hospitals' machines in a simulation: slow, absent, late, on a virtual clock.

Nobody waits: a site's virtual seconds are its training steps over its speed, so results do not depend on the machine that
simulates. A site that would miss the deadline drops out of the round, as in FedAvg, or does the share of its steps that fits,
as in FedProx (Li et al., arXiv 1812.06127). A repeated round meets the same machines: choose `min_sites` accordingly.
"""

import math
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from fedseg.federated.messages import SiteFailure
from fedseg.federated.rounds import derive_seed
from fedseg.sections import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section


class SimulatedMachine(Section):
    """One hospital's machine and its habits."""

    speed: PositiveFloat = 1.0
    """Training steps per virtual second."""
    dropout: Fraction = 0.0
    """Probability that it does not answer in a round."""
    offline: tuple[PositiveInt, PositiveInt] | None = None
    """First and last round of a longer absence."""
    joins: PositiveInt = 1
    """First round in which it takes part."""


class Machines(Section):
    """What holds for all machines of a federation."""

    speed_sigma: NonNegativeFloat = 0.0
    """Spread of log-normal speeds that are drawn for hospitals without a machine of their own; 0: all have speed 1."""
    dropout: Fraction = 0.0
    """For hospitals without a machine of their own."""
    deadline: PositiveFloat | None = None
    """Virtual seconds of a round; absent: everybody is waited for."""
    partial: bool = False
    """Whether a site that is too slow does the share of its steps that fits, instead of being late."""
    seed: int = Field(default=0, ge=0)
    """Decides speeds and absences, whatever the experiment's seed."""

    def of(self, site: str, own: SimulatedMachine | None) -> "MachinePlan":
        """The plan of one hospital."""
        if own is None:
            generator = np.random.default_rng(derive_seed(self.seed, "speed", site))
            own = SimulatedMachine(
                speed=float(np.exp(self.speed_sigma * generator.standard_normal())), dropout=self.dropout
            )
        return MachinePlan(site, own, self.deadline, self.partial, self.seed)


@dataclass(frozen=True)
class MachinePlan:
    """What one hospital's machine does in which round; picklable."""

    site: str
    machine: SimulatedMachine
    deadline: float | None
    partial: bool
    seed: int

    def absence(self, server_round: int) -> SiteFailure | None:
        """Why the hospital is not there in a round; None if it is."""
        machine = self.machine
        if server_round < machine.joins:
            return SiteFailure(self.site, server_round, "failed", "NotYetJoined")
        if machine.offline is not None and machine.offline[0] <= server_round <= machine.offline[1]:
            return SiteFailure(self.site, server_round, "failed", "Offline")
        draw = np.random.default_rng(derive_seed(self.seed, "dropout", server_round, self.site)).random()
        return SiteFailure(self.site, server_round, "failed", "DroppedOut") if draw < machine.dropout else None

    def steps(self, wanted: int) -> int:
        """How many of the wanted steps it does before the deadline; 0: it is late."""
        if self.deadline is None or wanted <= self.deadline * self.machine.speed:
            return wanted
        return math.floor(self.deadline * self.machine.speed) if self.partial else 0

    def seconds(self, steps: int) -> float:
        """Virtual seconds for so many steps."""
        return steps / self.machine.speed
