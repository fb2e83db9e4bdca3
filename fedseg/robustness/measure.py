"""Measure several networks on one case through one scanner: the unit of work, done in any process."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedseg.config import Experiment
from fedseg.data.cohort import Case
from fedseg.data.features import align
from fedseg.data.preprocess import PreparedCase, prepare_case
from fedseg.data.shift.profiles import Shift
from fedseg.errors import CaseError
from fedseg.federated.fingerprint import Fingerprint
from fedseg.inference import predict_logits
from fedseg.metrics import LabelScore, score_case
from fedseg.model_file import load_model
from fedseg.robustness.confidence import Confidence, confidence_of
from fedseg.robustness.networks import Network
from fedseg.robustness.uncertainty import Doubt, doubt_of

NETWORKS_OPEN = 32
"""In each process."""


@dataclass(frozen=True)
class Unit:
    """One case in one view, and what is missing of it."""

    view: str
    """Key of the view."""
    case: Case
    shift: Shift | None
    to_score: tuple[Network, ...]
    to_doubt: tuple[Network, ...]
    """For which uncertainty is measured."""
    surface: bool
    device: str


@dataclass(frozen=True)
class Scored:
    """What one network makes of the case."""

    labels: dict[str, LabelScore]
    confidence: Confidence


@dataclass(frozen=True)
class Measured:
    """What became of a unit."""

    scored: dict[str, Scored]
    """By SHA-256 of the network."""
    doubts: dict[str, Doubt]
    skipped: str = ""
    """Why the case cannot be used in this view; empty if it can."""


def measure(unit: Unit) -> Measured:
    """Prepare the case once for all networks that prepare it alike, and measure them; on one CPU thread.

    Where reversed images are aligned (`data.polarity`), each image is judged alone, as in `fedseg predict`.
    """
    torch.set_num_threads(1)  # so that the number of processes does not change a bit
    scored: dict[str, Scored] = {}
    doubts: dict[str, Doubt] = {}
    try:
        for network, experiment, model, case in _prepared(unit):
            logits_KDHW = _logits(model, case.image, experiment=experiment, device=unit.device)
            if network in unit.to_score:
                scored[network.sha256] = _score(logits_KDHW, case, experiment, surface=unit.surface)
            if network in unit.to_doubt:
                doubts[network.sha256] = doubt_of(
                    model,
                    logits_KDHW.argmax(dim=0).numpy(),
                    case,
                    experiment,
                    partial(_logits, experiment=experiment, device=unit.device),
                )
    except CaseError as error:
        return Measured({}, {}, str(error.reason))
    return Measured(scored, doubts)


def _prepared(unit: Unit) -> Iterator[tuple[Network, Experiment, nn.Module, PreparedCase]]:
    cases: dict[str, PreparedCase] = {}
    for network in dict.fromkeys((*unit.to_score, *unit.to_doubt)):
        experiment, model, fingerprint = _opened(network.path, network.sha256, unit.device)
        alike = experiment.data.model_dump_json()
        if alike not in cases:
            cases[alike] = prepare_case(unit.case, experiment.task, experiment.data, unit.shift)
        yield network, experiment, model, align(cases[alike], experiment.data, fingerprint)


@lru_cache(NETWORKS_OPEN)
def _opened(path: Path, _sha256: str, device: str) -> tuple[Experiment, nn.Module, Fingerprint]:
    experiment, model, fingerprint = load_model(path)
    return experiment, model.to(device), fingerprint


def _logits(model: nn.Module, image_CDHW: NDArray[np.float32], *, experiment: Experiment, device: str) -> Tensor:
    return predict_logits(
        model,
        image_CDHW,
        experiment.training.patch_size,
        overlap=experiment.evaluation.overlap,
        device=device,
        precision=experiment.training.precision,
        slicing=experiment.slicing,
    )


def _score(logits_KDHW: Tensor, case: PreparedCase, experiment: Experiment, *, surface: bool) -> Scored:
    assert case.label is not None
    labels = score_case(
        logits_KDHW.argmax(dim=0).to(torch.uint8).numpy(),
        case.label,
        case.spacing,
        experiment.task.structures,
        surface=surface,
        tolerance=experiment.evaluation.surface_tolerance,
    )
    return Scored(labels, confidence_of(logits_KDHW, case.label))
