"""Several sites in one process: asked by name, or pooled into one."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedseg import logs
from fedseg.config import Experiment
from fedseg.data.preprocess import PreparedCase, PreparedCohort
from fedseg.errors import SiteAbstained, SiteLate
from fedseg.federated.fingerprint import UNKNOWN, Fingerprint, joined
from fedseg.federated.machines import MachinePlan
from fedseg.federated.messages import Answer, RoundInstructions, SiteFailure
from fedseg.federated.site import AnswerRound, Site, SiteData
from fedseg.site.config import SiteConfig

log = logging.getLogger(__name__)


class PooledSite(Site):
    """All sites' cases in one place, each in the part (training, validation) that it has at its own site.

    An epoch has as many steps as all sites' epochs together. The yardstick that hospitals cannot have; only a
    simulation can make it.
    """

    NAME = "pooled"

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites[0].config.model_copy(update={"name": self.NAME}))
        self._sites = tuple(sites)
        self.parts = len(sites)

    def prepare(
        self, experiment: Experiment, fingerprint: Fingerprint = UNKNOWN, *, progress: bool = False
    ) -> SiteData:
        """Join what the sites prepare; each decides for its own images whether to negate them."""
        parts = [site.prepare(experiment, fingerprint, progress=progress) for site in self._sites]
        return SiteData(
            self._join([part.training for part in parts]),
            self._join([part.validation for part in parts]),
            sum(part.num_listed for part in parts),
        )

    def fingerprint(self, experiment: Experiment) -> Fingerprint:
        """That of the sites together, as the server would join it."""
        parts = {site.config.name: site.fingerprint(experiment) for site in self._sites}
        return joined(parts, aligned=experiment.data.polarity == "aligned")

    def _join(self, cohorts: Sequence[PreparedCohort]) -> PreparedCohort:
        """Names get their site's in front: two sites may use the same ones."""
        cases: list[PreparedCase] = []
        quarantined: dict[str, str] = {}
        for site, cohort in zip(self._sites, cohorts, strict=True):
            cases += [replace(case, name=f"{site.config.name}/{case.name}") for case in cohort.cases]
            quarantined |= {f"{site.config.name}/{case}": reason for case, reason in cohort.quarantined.items()}
        return PreparedCohort(tuple(cases), quarantined)


def answer_safely(site: AnswerRound, name: str, instructions: RoundInstructions) -> Answer:
    """Ask a site; any error becomes a failure that names the error's class and nothing else.

    This is the one broad `except`: an error's text may hold a patient's file name, so it stays in the local log.
    """
    with logs.about(site=name, round=instructions.server_round):
        try:
            return site(instructions)
        except SiteAbstained as abstention:
            log.warning("site %s abstains from round %d: %s", name, instructions.server_round, abstention)
            return SiteFailure(name, instructions.server_round, "abstained", abstention.reason)
        except SiteLate as late:
            log.info("%s", late)
            return SiteFailure(name, instructions.server_round, "late", "deadline")
        except Exception as error:
            log.exception("site %s failed in round %d", name, instructions.server_round)
            return SiteFailure(name, instructions.server_round, "failed", type(error).__name__)


@dataclass(frozen=True)
class OpenSites:
    """Opens sites when they are first asked; picklable, so that worker processes can do it.

    Args:
        configs: the sites.
        machines: of simulated hospitals; the others are there, always and at once.
    """

    configs: tuple[SiteConfig, ...]
    machines: tuple[MachinePlan, ...] = ()

    def __call__(self) -> Callable[[str, RoundInstructions], Answer]:
        """A function that asks a site by name."""
        configs = {config.name: config for config in self.configs}
        machines = {machine.site: machine for machine in self.machines}
        opened: dict[str, Site] = {}

        def ask(name: str, instructions: RoundInstructions) -> Answer:
            machine = machines.get(name)
            if machine is not None and instructions.train:
                absence = machine.absence(instructions.server_round)
                if absence is not None:
                    return absence
            if name not in opened:
                opened[name] = Site(configs[name], seeded_noise=True, machine=machine)
            return answer_safely(opened[name], name, instructions)

        return ask
