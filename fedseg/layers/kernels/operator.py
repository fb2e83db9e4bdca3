"""Bi-WKV as one function: checks its inputs and chooses who computes it."""

import torch
from torch import Tensor

from fedseg.errors import ModelError
from fedseg.layers.kernels.choice import IMPLEMENTATIONS, chosen
from fedseg.layers.kernels.exported import bi_wkv_plain

_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.5 and 2.6 have only this


def bi_wkv(k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> Tensor:
    """Let every token see every other one, weighted by its key and their distance; see `fedseg.layers.kernels`.

    Sums are accumulated in fp32, or in float64 where inputs are float64 or decays are large, also under autocast. All four
    inputs have gradients. Nothing overflows, whatever keys and decays are; of decays beyond +-300, 300 is taken.

    While a network is exported, this consists of plain tensor operations, else it is an operator of its own.

    Args:
        k_BTC: keys, any floating point type and strides; T >= 1.
        v_BTC: values, as many.
        decay_C: how fast weights fall from one end of the sequence to the other, in nats; negative: they rise.
        first_C: extra weight of a token for itself, times T.

    Returns:
        `(B, T, C)` in the type of `v_BTC`.

    Raises:
        ModelError: the shapes do not fit together, the numbers are not floating point, or the implementation that was asked
            for (`FEDSEG_BI_WKV`, `use_implementation`) does not exist or cannot run here.
    """
    _check(k_BTC, v_BTC, decay_C, first_C)
    if _is_exporting():
        return bi_wkv_plain(k_BTC, v_BTC, decay_C, first_C)
    name = chosen(k_BTC.device.type)
    if name == "triton" and torch.float64 in (k_BTC.dtype, v_BTC.dtype):
        name = "torch"  # Triton's is for training, in at most float32
    return IMPLEMENTATIONS[name].call(k_BTC, v_BTC, decay_C, first_C)


def _check(k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> None:
    if k_BTC.dim() != 3 or k_BTC.shape != v_BTC.shape or k_BTC.shape[1] < 1:
        raise ModelError(
            "Bi-WKV takes keys and values of one shape (B, T, C) with T >= 1, "
            f"got {tuple(k_BTC.shape)} and {tuple(v_BTC.shape)}"
        )
    if decay_C.shape != k_BTC.shape[2:] or first_C.shape != k_BTC.shape[2:]:
        raise ModelError(
            f"Bi-WKV takes a decay and a bonus for each of {k_BTC.shape[2]} channels, "
            f"got {tuple(decay_C.shape)} and {tuple(first_C.shape)}"
        )
    for tensor in (k_BTC, v_BTC, decay_C, first_C):
        if not tensor.is_floating_point():
            raise ModelError(f"Bi-WKV takes floating point numbers, got {tensor.dtype}")
