"""Checks of the machine: device, disk, memory, compiler."""

import math
import os
import shutil
from pathlib import Path

from fedseg.config import Experiment
from fedseg.data.audit import Audit
from fedseg.site.finding import Finding, Known, attention, need, not_ready, ok

GB = 1e9
PROGRAM_BYTES = 1.5 * GB
"""Python and its libraries in memory."""


def check_device(known: Known) -> Finding:
    """What the network would be computed on."""
    import torch

    from fedseg.device import autocast, pick_device, usable_cores

    config = need(known.config, "the site file")
    device = pick_device(config.device)
    if known.experiment is not None:
        autocast(device, known.experiment.training.precision)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found = f"{torch.cuda.get_device_name(device)}: {_size(free)} of {_size(total)} are free"
        if free < total / 2:
            return attention(found, "see with nvidia-smi who else uses it")
        return ok(found)
    cores, threads = usable_cores(), config.threads
    found = f"CPU, {threads} of {cores} cores"
    if threads > cores:
        return attention(found, f"threads = {cores} in the site file: more threads than cores are slow")
    return ok(found, f"threads = {cores} in the site file would use all" if threads < cores else "")


def check_disk(known: Known) -> Finding:
    """Room for preprocessed volumes and for what the site keeps."""
    config = need(known.config, "the site file")
    experiment = need(known.experiment, "the experiment")
    cache, state = Path(config.cache), config.state_folder
    wanted = {
        "cache": (cache, prepared_bytes(need(known.audit, "the data"), experiment)),
        "state": (state, 4 * weights_bytes(experiment)),
    }
    told, short, closed = [], [], []
    for name, (folder, size) in wanted.items():
        nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(nearest).free
        told.append(f"{name}: {_size(free)} free, about {_size(size)} needed")
        if not os.access(nearest, os.W_OK | os.X_OK):
            closed.append(str(nearest))
        elif free < 1.1 * size:
            short.append(str(folder))
    if closed:
        return not_ready(f"{', '.join(closed)}: cannot be written by this user", "change its owner, or the site file")
    if short:
        return not_ready("; ".join(told), f"make room in {', '.join(short)}, or name another folder in the site file")
    return ok("; ".join(told))


def check_memory(known: Known) -> Finding:
    """Room for the program, the weights, and the scores of the largest volume."""
    experiment = need(known.experiment, "the experiment")
    voxels = largest_volume(need(known.audit, "the data"), experiment)
    scores = voxels * 4 * (len(experiment.task.channels) + 2 * experiment.task.num_labels)
    wanted, free = PROGRAM_BYTES + 8 * weights_bytes(experiment) + scores, free_memory()
    found = f"{_size(free)} are free, about {_size(wanted)} are needed"
    if free < wanted:
        return attention(found, "end other programs, or use a machine with more memory")
    return ok(found)


def check_compiler(known: Known) -> Finding:
    """Only RWKV networks compile something."""
    from fedseg.layers.kernels.build import NO_COMPILER, compiler

    experiment = need(known.experiment, "the experiment")
    if "rwkv" not in experiment.model.name:
        return ok(f"{experiment.model.name} needs none")
    command = compiler()
    if command is None:
        return attention(NO_COMPILER, "install g++: without it the network is several times slower on a CPU")
    return ok(command[0])


def prepared_bytes(audit: Audit, experiment: Experiment) -> float:
    """About the size of all preprocessed volumes."""
    shape = [spread.median for spread in audit.fingerprint.shape]
    return audit.fingerprint.cases * _voxels(audit, experiment, shape) * (4 * len(experiment.task.channels) + 1)


def largest_volume(audit: Audit, experiment: Experiment) -> float:
    """About the voxels of the largest volume after preprocessing."""
    return _voxels(audit, experiment, [spread.maximum for spread in audit.fingerprint.shape])


def weights_bytes(experiment: Experiment) -> int:
    """Size of the network's weights."""
    import torch

    from fedseg.federated.networks import new_model

    with torch.device("meta"):
        return sum(tensor.numel() * tensor.element_size() for tensor in new_model(experiment).state_dict().values())


def free_memory() -> float:
    """Bytes that this process may still take: of the machine, or of its container."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text()
    except OSError:
        return free
    return free if limit == "max" else min(free, float(limit) - float(used))


def _size(number: float) -> str:
    return f"{number / GB:.1f} GB" if number >= GB else f"{number / 1e6:.3g} MB"


def _voxels(audit: Audit, experiment: Experiment, shape: list[float]) -> float:
    """Of a volume with so many voxels in its file, once it is resampled."""
    spacing = [spread.median for spread in audit.fingerprint.spacing]
    target = experiment.data.spacing or spacing
    return math.prod(n * old / new for n, old, new in zip(shape, spacing, target, strict=False))
