"""Where tensors live and how they are computed: device, precision, threads, randomness.

The programs call `pick_device`, `configure` and `seed_everything` once; `autocast` is for the inner loops.
"""

import os
import random
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
import torch

from fedseg.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """What OMP_NUM_THREADS says; else one for each core."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else usable_cores()


def pick_device(name: str = "auto") -> torch.device:
    """Turn a device's name into a device that exists on this machine.

    Args:
        name: `auto` (the first GPU if there is one, else the CPU), `cpu`, `cuda` or `cuda:1`.

    Raises:
        ConfigError: no such kind of device, or this machine has none of it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:<number>, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:<number>, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} GPUs; try cpu or auto")
    return device


def configure(*, threads: int | None = None, deterministic: bool = False) -> None:
    """Set what torch keeps for the whole process.

    Args:
        threads: threads of one operation on the CPU; absent: torch's choice.
        deterministic: on a GPU, prefer kernels that give the same bits each time; where torch has none it warns. On a
            CPU the same seed, inputs and number of threads give the same bits anyway.
    """
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not deterministic  # patches have one size, so the search pays off
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (dropout draws from the last), on every device.

    Args:
        seed: in [0, 2^32).
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third-party transforms draw from numpy's global generator
    torch.manual_seed(seed)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context in which a network's forward pass runs; its parameters stay fp32.

    Raises:
        ConfigError: fp16 on a CPU, where it is slow and overflows unnoticed.
    """
    if precision == "fp32":
        return nullcontext()
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    return torch.autocast(device.type, dtype=_DTYPES[precision])
