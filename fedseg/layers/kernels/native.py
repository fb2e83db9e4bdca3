"""Bi-WKV in C++ for the CPU, see `bi_wkv.cpp`: compiled at first use, never at import."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedseg.errors import ModelError
from fedseg.layers.kernels.build import NO_COMPILER, build, compiler, find
from fedseg.layers.kernels.registry import Gradients, register

SOURCE = Path(__file__).with_name("bi_wkv.cpp")

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_FAILURES = {1: "there is not enough memory", 2: "it does not know this type of numbers"}


def unavailable() -> str | None:
    """Why there is no C++ implementation here, as far as one can tell without compiling; None: there is."""
    return NO_COMPILER if compiler() is None and find(SOURCE) is None else None


@functools.cache
def load() -> Any:
    """The function in the library, compiled before if need be.

    Raises:
        ModelError: no compiler, or it fails, or the library cannot be loaded.
    """
    path = build(SOURCE)
    try:
        function = ctypes.CDLL(str(path)).fedseg_bi_wkv
    except (OSError, AttributeError) as error:
        raise ModelError(f"{path} cannot be loaded: {error}; delete it, and it is built anew") from error
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    rows = [pointer, number, number]
    types: list[Any] = [*[ctypes.c_int] * 3, *[number] * 3, *rows, *rows, *[pointer] * 3, *rows, *[pointer] * 4]
    function.argtypes = types
    function.restype = ctypes.c_int
    return function


def _forward(k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> Tensor:
    k, v = _alike(k_BTC, v_BTC)
    decay, first = _parameters(decay_C, first_C)
    y_BTC = torch.empty(v.shape, dtype=v.dtype)
    if not v.numel():
        return y_BTC.to(v_BTC.dtype)
    _call(k, v, decay, first, y_BTC.data_ptr(), None, [0] * 4)
    return y_BTC.to(v_BTC.dtype)


def _backward(gy_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> Gradients:
    k, v, gy = _alike(k_BTC, v_BTC, gy_BTC)
    decay, first = _parameters(decay_C, first_C)
    found = [torch.empty(x.shape, dtype=x.dtype) for x in (k, v)] + [torch.zeros_like(x) for x in (decay, first)]
    if v.numel():
        _call(k, v, decay, first, None, gy, [gradient.data_ptr() for gradient in found])
    inputs = (k_BTC, v_BTC, decay_C, first_C)
    gk, gv, gdecay, gfirst = (gradient.to(x.dtype) for gradient, x in zip(found, inputs, strict=True))
    return gk, gv, gdecay, gfirst


bi_wkv_cpp = register("bi_wkv_cpp", _forward, _backward)


def _call(
    k: Tensor, v: Tensor, decay: Tensor, first: Tensor, y: int | None, gy: Tensor | None, found: Sequence[int]
) -> None:
    failed = load()(
        _TYPES[v.dtype],
        decay.dtype == torch.float64,
        torch.get_num_threads(),
        *v.shape,
        *_rows(k),
        *_rows(v),
        decay.data_ptr(),
        first.data_ptr(),
        y,
        *((None, 0, 0) if gy is None else _rows(gy)),
        *found,
    )
    if failed:
        raise ModelError(f"Bi-WKV of {tuple(v.shape)} in C++ failed: {_FAILURES[failed]}")


def _rows(x_BTC: Tensor) -> tuple[int, int, int]:
    return x_BTC.data_ptr(), x_BTC.stride(0), x_BTC.stride(1)


def _alike(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one type that the library knows, with neighbouring channels."""
    if any(x.device.type != "cpu" for x in tensors):
        raise ModelError(f"Bi-WKV in C++ works on a CPU, got tensors on {', '.join(str(x.device) for x in tensors)}")
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in tensors])
    if dtype not in _TYPES:
        dtype = torch.float32
    return [x.to(dtype) if x.stride(2) == 1 else x.to(dtype).contiguous() for x in tensors]


def _parameters(decay_C: Tensor, first_C: Tensor) -> list[Tensor]:
    both = torch.float64 if torch.float64 in (decay_C.dtype, first_C.dtype) else torch.float32
    return [x.to(both).contiguous() for x in (decay_C, first_C)]
