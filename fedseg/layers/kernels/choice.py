"""Which implementation of Bi-WKV computes: the fastest that this machine has, unless somebody says otherwise."""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fedseg.errors import ModelError
from fedseg.layers.kernels import native, triton_scan
from fedseg.layers.kernels.blocked import bi_wkv_torch
from fedseg.layers.kernels.reference import bi_wkv_reference
from fedseg.layers.kernels.registry import Forward

VARIABLE = "FEDSEG_BI_WKV"
"""Environment variable that names an implementation, or `auto`."""


def _always() -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute Bi-WKV."""

    call: Forward
    devices: tuple[str, ...]
    """Types of devices that it is for."""
    what: str
    """One line for people."""
    unavailable: Callable[[], str | None] = _always
    """Why it cannot run here, as far as one can tell without compiling; None: it can."""


IMPLEMENTATIONS: dict[str, Implementation] = {
    "cpp": Implementation(native.bi_wkv_cpp, ("cpu",), "C++, compiled at first use", native.unavailable),
    "triton": Implementation(
        triton_scan.bi_wkv_triton, ("cuda",), "Triton, compiled at first use", triton_scan.unavailable
    ),
    "torch": Implementation(bi_wkv_torch, ("cpu", "cuda"), "PyTorch, by blocks; needs no compiler"),
    "reference": Implementation(bi_wkv_reference, ("cpu", "cuda"), "by definition, in float64; slow, for tests"),
}

_chosen: list[str] = []
"""Names in force, innermost last; see `use_implementation`."""
_automatic: dict[str, str] = {}
"""What `auto` came to, by type of device."""


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Let one implementation compute inside, in all threads, whatever the environment says.

    Args:
        name: one of `IMPLEMENTATIONS`, or `auto`.

    Raises:
        ModelError: there is no such implementation, or it cannot run here.
    """
    _require(name, "use_implementation")
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.remove(name)


def chosen(device: str) -> str:
    """Name of the implementation that computes on a type of device.

    Raises:
        ModelError: the environment names one that does not exist or cannot run here.
    """
    name = _chosen[-1] if _chosen else os.environ.get(VARIABLE, "auto")
    if name == "auto":
        return _fastest(device)
    if not _chosen:
        _require(name, VARIABLE)
    return name


chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]
# `torch.compiler.assume_constant_result` does the same, but imports the compiler, which takes a second


def _fastest(device: str) -> str:
    if device not in _automatic:
        _automatic[device] = "torch"
        preferred = next((name for name, one in IMPLEMENTATIONS.items() if one.devices == (device,)), None)
        reason = f"there is no faster one for {device}" if preferred is None else _why_not(preferred)
        if preferred is not None and reason is None:
            _automatic[device] = preferred
        else:
            warnings.warn(
                f"Bi-WKV, which RWKV-UNet needs, runs in PyTorch here, several times slower than it could: {reason}. "
                f"Results are the same. {VARIABLE}=torch chooses this and silences the warning",
                stacklevel=2,
            )
    return _automatic[device]


@functools.cache
def _why_not(name: str) -> str | None:
    """Why an implementation cannot run, after compiling it if that takes only a moment."""
    reason = IMPLEMENTATIONS[name].unavailable()
    if reason is None and name == "cpp":
        try:
            native.load()
        except ModelError as error:
            return str(error)
    return reason


def _require(name: str, source: str) -> None:
    if name == "auto":
        return
    if name not in IMPLEMENTATIONS:
        raise ModelError(
            f"{source}: there is no implementation {name!r} of Bi-WKV; there is auto, {', '.join(IMPLEMENTATIONS)}"
        )
    reason = _why_not(name)
    if reason is not None:
        raise ModelError(f"{source}: {name} cannot run here: {reason}")
