"""One round on made-up volumes, as the site service would answer it, in a folder that is gone afterwards."""

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fedseg.config import Experiment, TaskConfig
from fedseg.federated.messages import RoundInstructions, SiteFailure
from fedseg.federated.networks import start_state
from fedseg.site.config import SiteConfig
from fedseg.site.desk import Desk
from fedseg.site.finding import Finding, Known, need, not_ready, ok

CASES = 3


def rehearse(known: Known) -> Finding:
    """Train one step, with this site's device, threads and policy."""
    config = need(known.config, "the site file")
    experiment = _shortened(need(known.experiment, "the experiment"))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedseg-check-") as folder, _errors_of_desk() as errors:
        _write_cohort(Path(folder) / "data", experiment)
        instructions = RoundInstructions(1, start_state(experiment).weights, experiment.to_json())
        desk, steps = Desk(_elsewhere(config, Path(folder))), [0]

        def watch(phase: str, done: int, total: int) -> None:  # noqa: ARG001
            steps[0] = max(steps[0], done if phase == "training" else 0)

        answer = desk.answer(instructions.encode(), train=True, watch=watch)
    seconds = time.monotonic() - begun
    if isinstance(answer, SiteFailure):
        told = f": {errors[-1]}" if errors else ""
        remedy = "see the policy" if answer.reason.startswith("policy.") else "tell the coordinator"
        if "OutOfMemory" in answer.reason:
            remedy = "use a device with more memory, or ask the coordinator for smaller patches or batches"
        return not_ready(f"a round on made-up volumes ends with {answer.reason}{told}", remedy)
    size = sum(memoryview(buffer).nbytes for buffer in answer)
    return ok(
        f"{steps[0]} training step and scores on {CASES} made-up cases in {seconds:.1f} s, start included; "
        f"an update of {size / 1e6:.3g} MB{_device_memory()}"
    )


def _shortened(experiment: Experiment) -> Experiment:
    """One step; weights of a warm start lie at the coordinator."""
    return experiment.model_copy(
        update={
            "model": experiment.model.model_copy(update={"pretrained": None}),
            "data": experiment.data.model_copy(update={"validation_fraction": 0.34, "min_cases": 1}),
            "training": experiment.training.model_copy(update={"steps_per_epoch": 1}),
            "federation": experiment.federation.model_copy(update={"local_epochs": 1}),
        }
    )


def _elsewhere(config: SiteConfig, folder: Path) -> SiteConfig:
    """The site with another cohort, and limits that made-up cases can keep."""
    policy = config.policy.model_copy(
        update={"hours": None, "max_rounds": None, "min_cases": 1, "min_validation_cases": 1}
    )
    return SiteConfig(
        name=config.name,
        data=str(folder / "data"),
        cache=str(folder / "cache"),
        state=str(folder / "state"),
        policy=policy,
        device=config.device,
        threads=config.threads,
    )


def _write_cohort(folder: Path, experiment: Experiment) -> None:
    """Noise with a slab for each structure, as large as a patch."""
    spacing = experiment.data.spacing or (1.0, 1.0, 1.0)
    affine = np.diag([*spacing[::-1], 1.0])
    generator = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in range(CASES):
        label_DHW = _slabs(experiment.training.patch_size, experiment.task)
        _save(label_DHW, affine, folder / "labelsTr" / f"case{case}.nii.gz")
        for channel in range(len(experiment.task.channels)):
            image_DHW = _intensities(label_DHW, experiment, generator)
            _save(image_DHW, affine, folder / "imagesTr" / f"case{case}_{channel:04d}.nii.gz")


def _slabs(shape: tuple[int, int, int], task: TaskConfig) -> NDArray[np.uint8]:
    """A volume in which every label has some voxels."""
    label = np.zeros(int(np.prod(shape)), dtype=np.uint8)
    run = len(label) // (task.num_labels + 1)
    for value in task.structures.values():
        label[value * run : (value + 1) * run] = value
    return label.reshape(shape)


def _intensities(
    label_DHW: NDArray[np.uint8], experiment: Experiment, generator: np.random.Generator
) -> NDArray[np.int16]:
    low, high = experiment.data.window or (0.0, 1000.0)
    share = label_DHW / experiment.task.num_labels + generator.normal(0, 0.1, label_DHW.shape)
    return np.asarray(np.clip(low + (high - low) * share, -1000, 3000), dtype=np.int16)


def _save(array_DHW: NDArray[np.uint8] | NDArray[np.int16], affine: NDArray[np.float64], path: Path) -> None:
    image = nib.Nifti1Image(array_DHW.transpose(2, 1, 0), affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nib.save(image, path)


def _device_memory() -> str:
    import torch

    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return f"; {peak / 1e9:.1f} GB of the GPU were used" if peak else ""


@contextmanager
def _errors_of_desk() -> Iterator[list[str]]:
    """What the desk writes into its log, which a person sits before; it prints nothing meanwhile."""
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            told.append(f"{type(error).__name__}: {error}" if error else record.getMessage())

    logger, listener = logging.getLogger("fedseg.site.desk"), Listener(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(listener)
    try:
        yield told
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagate
