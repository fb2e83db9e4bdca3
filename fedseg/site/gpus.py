"""What NVIDIA's management library says of the graphics cards, where there is one: the extra `gpu` installs its Python side."""

import importlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One card at one moment."""

    index: int
    """As the driver counts them."""
    memory_used: int
    """Bytes."""
    memory_size: int
    """Bytes."""
    utilisation: float
    """Share of the last moments in which it computed anything, in [0, 1]."""


def gpus() -> list[Gpu]:
    """All cards that this process may see; none without the library, a driver or a card."""
    nvml = _library()
    if nvml is None:
        return []
    found = []
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            card = nvml.nvmlDeviceGetHandleByIndex(index)
            memory, busy = nvml.nvmlDeviceGetMemoryInfo(card), nvml.nvmlDeviceGetUtilizationRates(card)
            found.append(Gpu(index, int(memory.used), int(memory.total), busy.gpu / 100))
    except nvml.NVMLError:  # a card that fell off the bus, a part of a card that has no utilisation
        pass
    return found


@lru_cache(maxsize=1)
def _library() -> Any:
    """The library, ready; None where it is not installed or finds no driver."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml
