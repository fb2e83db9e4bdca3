"""A site: instructions in, update out. The same object trains in a simulation, behind Flower, and at a hospital."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedseg.config import Experiment
from fedseg.data.augment import mirror_pairs
from fedseg.data.cohort import Cohort, read_cohort, split_by_person
from fedseg.data.features import describe
from fedseg.data.patches import Batch, PatchSampler
from fedseg.data.preprocess import PreparedCase, PreparedCohort, prepare_cohort, require_enough
from fedseg.data.shift.profiles import Shift
from fedseg.device import pick_device, seed_everything
from fedseg.drift import SiteDrift, site_drift
from fedseg.errors import ModelError, SiteLate, TrainingDiverged
from fedseg.evaluation import evaluate
from fedseg.federated.controls import SiteControls
from fedseg.federated.ditto import personal_tensors, train_personal
from fedseg.federated.exchange import anchor_of, check_weights, put_weights, take_weights
from fedseg.federated.fingerprint import UNKNOWN, CaseFeatures, Fingerprint, Signs, fingerprint_of, polarity
from fedseg.federated.machines import MachinePlan
from fedseg.federated.messages import RoundInstructions, SiteUpdate
from fedseg.federated.networks import outline, parsed, private_in, warm_model
from fedseg.federated.privacy import protect
from fedseg.federated.private import PrivateTensors
from fedseg.federated.rounds import derive_seed
from fedseg.federated.weights import Weights, norm, subtract
from fedseg.site.config import SiteConfig
from fedseg.training import TrainingReport, train_locally

log = logging.getLogger(__name__)

AnswerRound = Callable[[RoundInstructions], SiteUpdate]
"""What a site is to the rest of the program."""
Watch = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much; may raise `RoundCancelled` to end the round."""


EXPERIMENTS_OPEN = 4
"""Of so many experiments the volumes stay open; of a further one, the oldest gives way."""


@dataclass(frozen=True)
class SiteData:
    """The usable cases of a site."""

    training: PreparedCohort
    validation: PreparedCohort
    num_listed: int
    """Training cases in the folder, usable or not."""


class Site:
    """One hospital, with its preprocessed volumes kept open between rounds.

    Args:
        config: where its data lie and on what it computes.
        watch: told about the progress of rounds.
        seeded_noise: noise that privacy asks for comes from the experiment's seed, so that a simulation can be repeated;
            whoever knows the seed can take it off again.
        machine: in a simulation, how fast it is on a virtual clock.
    """

    def __init__(
        self,
        config: SiteConfig,
        *,
        watch: Watch = lambda *_: None,
        seeded_noise: bool = False,
        machine: MachinePlan | None = None,
    ) -> None:
        self.config = config
        self.watch = watch
        self._machine = machine
        self._seeded_noise = seeded_noise
        self.parts = 1
        """As many steps as so many sites take in an epoch, where the experiment says how many that are."""
        self.last_training: TrainingReport | None = None
        """For those who look on at the site; of it `__call__` returns what the server may know."""
        self._data: dict[tuple[str, Signs], SiteData] = {}
        self._features: dict[tuple[str, Signs], tuple[CaseFeatures, ...]] = {}

    def __call__(self, instructions: RoundInstructions) -> SiteUpdate:
        """Score the received weights, train on them, and return what changed; or only the site's fingerprint.

        Private tensors take the place of the received ones, and are kept for the next round.

        Raises:
            SiteAbstained: too few of the site's cases are usable.
            ConfigError: the experiment does not validate here.
            ModelError: the received weights are not those of the experiment's network.
            TrainingDiverged: the loss became non-finite.
            RoundCancelled: by `watch`.
            SiteLate: a simulated machine misses the virtual deadline.
            StoreError: the site's private tensors are damaged.
        """
        experiment = parsed(instructions.experiment)
        if not instructions.train and not instructions.evaluate:
            return self._fingerprint_alone(experiment, instructions.server_round)
        check_weights(outline(instructions.experiment), instructions.weights)  # before memory is taken for them
        torch.set_num_threads(self.config.threads)
        data = self.prepare(experiment, instructions.fingerprint)
        device = pick_device(self.config.device)
        model = warm_model(instructions.experiment, device)
        private = private_in(model, experiment)
        kept = PrivateTensors(self.config.state_folder, instructions.experiment, self.config.name, private)
        put_weights(model, instructions.weights | self._own(kept, instructions, private))
        sums: dict[str, float] = {}
        if instructions.evaluate and data.validation.cases:
            sums = self._score(model, data, experiment, instructions.surface, device)
        quarantined = Counter((data.training.quarantined | data.validation.quarantined).values())
        update = SiteUpdate(
            self.config.name, instructions.server_round, {}, len(data.training.cases), sums, {}, dict(quarantined)
        )
        if not instructions.train:
            return update
        require_enough(data.training, data.num_listed, experiment.data)
        if private:
            kept.begin(instructions.server_round, instructions.weights)
        controls = self._controls(experiment, instructions, model, private)
        training = self._train(
            model, data.training.cases, experiment, instructions.server_round, device, private, controls
        )
        trained = take_weights(model)
        if private:
            kept.save(
                instructions.server_round, instructions.weights, _finite({name: trained[name] for name in private})
            )
        delta = subtract(trained, {name: array for name, array in instructions.weights.items() if name not in private})
        delta = protect(delta, experiment.privacy, self._noise(experiment.seed, instructions.server_round))
        if controls is not None:
            controls.keep(delta, training["steps"])
        if experiment.federation.personal_lambda is not None:
            own = personal_tensors(
                self.config.state_folder, instructions.experiment, self.config.name, instructions.weights
            )
            train_personal(own, model, instructions, experiment, data.training.cases, self.config.name, device)
        return SiteUpdate(update.site, update.server_round, delta, update.num_cases, sums, training, update.quarantined)

    def prepare(
        self, experiment: Experiment, fingerprint: Fingerprint = UNKNOWN, *, progress: bool = False
    ) -> SiteData:
        """Split the site's persons and preprocess their cases, once per experiment.

        Args:
            experiment: says how.
            fingerprint: the federation's; where the experiment wants it, images are negated to agree with it.
            progress: show a bar.
        """
        data = self._prepare(experiment, (), progress)
        signs = self._signs(experiment, fingerprint)
        return self._prepare(experiment, signs, progress) if signs else data

    def fingerprint(self, experiment: Experiment) -> Fingerprint:
        """Sums over the training images as they are."""
        return fingerprint_of(self._describe(experiment, ()))

    def drift(self, experiment: Experiment, fingerprint: Fingerprint) -> SiteDrift:
        """How unusual the training images, as they are trained on, are in the federation. For the site alone.

        Raises:
            ValueError: the fingerprint has other features.
        """
        return site_drift(self._describe(experiment, self._signs(experiment, fingerprint)), fingerprint)

    def _signs(self, experiment: Experiment, fingerprint: Fingerprint) -> Signs:
        """-1 for each channel to be negated; empty if there is none."""
        if experiment.data.polarity == "as-is" or not fingerprint:
            return ()
        signs = polarity((case.layout for case in self._describe(experiment, ())), fingerprint)
        return signs if min(signs, default=1) < 0 else ()

    def _describe(self, experiment: Experiment, signs: Signs) -> tuple[CaseFeatures, ...]:
        key = (experiment.digest(), signs)
        if key not in self._features:
            cases = self._prepare(experiment, signs, progress=False).training.cases
            while len(self._features) >= EXPERIMENTS_OPEN:
                del self._features[next(iter(self._features))]
            self._features[key] = tuple(describe(case) for case in self._noticed(cases, "looking"))
        return self._features[key]

    def _noticed(self, cases: Sequence[PreparedCase], doing: str) -> Iterator[PreparedCase]:
        for done, case in enumerate(cases):
            self.watch(doing, done, len(cases))
            yield case

    def _fingerprint_alone(self, experiment: Experiment, server_round: int) -> SiteUpdate:
        data = self.prepare(experiment)
        require_enough(data.training, data.num_listed, experiment.data)
        found = self.fingerprint(experiment)
        return SiteUpdate(self.config.name, server_round, {}, len(data.training.cases), fingerprint=found)

    def _prepare(self, experiment: Experiment, signs: Signs, progress: bool) -> SiteData:
        key = (experiment.digest(), signs)
        if key not in self._data:
            while len(self._data) >= EXPERIMENTS_OPEN:
                del self._data[next(iter(self._data))]
            cache = Path(self.config.cache)
            training, validation = split_by_person(self.cohort(), experiment.data.validation_fraction, experiment.seed)
            total = len(training.cases) + len(validation.cases)

            def prepared(part: Cohort, before: int, shift: Shift | None) -> PreparedCohort:
                return prepare_cohort(
                    part, experiment.task, experiment.data, cache, shift=shift, signs=signs, progress=progress,
                    on_case=lambda done: self.watch("preparing", before + done, total),
                )  # fmt: skip

            shift = self.config.shift
            self._data[key] = SiteData(
                prepared(training, 0, shift),
                prepared(validation, len(training.cases), shift and shift.for_scoring),
                len(training.cases),
            )
        return self._data[key]

    def cohort(self) -> Cohort:
        """The site's cases as they lie on disk."""
        cohort = read_cohort(Path(self.config.data), self.config.person)
        return cohort if self.config.cases is None else cohort.subset(self.config.cases)

    def _controls(
        self, experiment: Experiment, instructions: RoundInstructions, model: nn.Module, private: Collection[str]
    ) -> SiteControls | None:
        """SCAFFOLD at this site; None without it."""
        if not experiment.federation.control_variates:
            return None
        parameters = {name: instructions.weights[name] for name, _ in model.named_parameters() if name not in private}
        if not instructions.control.keys() <= parameters.keys() or any(
            array.shape != parameters[name].shape for name, array in instructions.control.items()
        ):
            raise ModelError("the received control is not that of the experiment's network")
        folder = self.config.state_folder / "controls"
        kept = PrivateTensors(folder, instructions.experiment, self.config.name, parameters)
        return SiteControls(kept, instructions, experiment, parameters)

    def _noise(self, seed: int, server_round: int) -> np.random.Generator:
        if self._seeded_noise:
            return np.random.default_rng(derive_seed(seed, "noise", server_round, self.config.name))
        return np.random.default_rng()  # seeded by the operating system

    def _own(self, kept: PrivateTensors, instructions: RoundInstructions, private: Collection[str]) -> Weights:
        """The site's private tensors, none before it has trained."""
        own = kept.before(instructions.server_round, instructions.weights) if private else {}
        if own is None and instructions.server_round > 1:
            log.warning("site %s has no private tensors before round %d", self.config.name, instructions.server_round)
        return own or {}

    def _score(
        self, model: nn.Module, data: SiteData, experiment: Experiment, surface: bool, device: torch.device
    ) -> dict[str, float]:
        return evaluate(
            model,
            data.validation.cases,
            experiment.task.structures,
            experiment.evaluation,
            experiment.training.patch_size,
            device=device,
            precision=experiment.training.precision,
            surface=surface,
            slicing=experiment.slicing,
            on_case=lambda done, _: self.watch("scoring", done, len(data.validation.cases)),
        ).sums()

    def _train(
        self,
        model: nn.Module,
        cases: tuple[PreparedCase, ...],
        experiment: Experiment,
        server_round: int,
        device: torch.device,
        private: Collection[str],
        controls: SiteControls | None,
    ) -> dict[str, float]:
        federation, training, name = experiment.federation, experiment.training, self.config.name
        if training.steps_per_epoch is not None:
            training = training.model_copy(update={"steps_per_epoch": training.steps_per_epoch * self.parts})
        patches_seed = derive_seed(experiment.seed, "patches", name)
        sampler = PatchSampler(cases, training, patches_seed, mirror_pairs(experiment.task.labels), experiment.slicing)
        seed_everything(derive_seed(experiment.seed, "training", server_round, name))
        batches = _epochs(sampler, (server_round - 1) * federation.local_epochs, federation.local_epochs)
        steps = len(sampler) * federation.local_epochs
        if self._machine is not None:
            steps = self._machine.steps(steps)
            if steps == 0:
                raise SiteLate(f"round {server_round}: {name} would miss the virtual deadline")
            batches = islice(batches, steps)
        report = train_locally(
            model,
            self._watched(batches, steps),
            training,
            anchor=anchor_of(model) if federation.proximal_mu else None,
            proximal_mu=federation.proximal_mu,
            unanchored=private,  # there is no common value to which they could be pulled
            correction=None if controls is None else controls.correction(),
            progress=(server_round - 1) / federation.rounds,
            device=device,
        )
        virtual = {} if self._machine is None else {"virtual_seconds": self._machine.seconds(report.steps)}
        self.last_training = report
        return {
            "loss": report.loss,
            "steps": float(report.steps),
            "seconds": report.seconds,
            "data_seconds": report.data_seconds,
        } | virtual

    def _watched(self, batches: Iterator[Batch], total: int) -> Iterator[Batch]:
        for done, batch in enumerate(batches):
            self.watch("training", done, total)
            yield batch
        self.watch("training", total, total)


def _finite(tensors: Weights) -> Weights:
    if not math.isfinite(norm(tensors)):  # no server screens them, and the site would start every later round with them
        raise TrainingDiverged("private tensors are NaN or infinite; try a lower learning rate or a smaller clip_norm")
    return tensors


def _epochs(sampler: PatchSampler, first: int, count: int) -> Iterator[Batch]:
    return chain.from_iterable(sampler.epoch(first + number) for number in range(count))
