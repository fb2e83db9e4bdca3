"""What the two parameters of Bi-WKV mean for a sequence of a given length, within bounds that no arithmetic overflows."""

import torch
from torch import Tensor

LARGEST = 300.0
"""Decays beyond +-300, and bonuses `first / T` beyond, act like this one, and have no gradient.

At 300 a neighbour of the nearest token weighs e^-300 / T less across the sequence; float64 holds every product of two such
weights, and nothing that is visible in a result is lost.
"""

SAFE_IN_FLOAT32 = 20.0
"""Up to this size of decay and bonus float32 holds all sums of weights, and gradients keep five digits."""


def rates(decay_C: Tensor, first_C: Tensor, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The decay per token `w` and the bonus `u`, `(C,)` each; differentiable."""
    decay_C, first_C = decay_C.to(dtype), first_C.to(dtype)
    return decay_C.clamp(-LARGEST, LARGEST) / tokens, (first_C / tokens).clamp(-LARGEST, LARGEST)


def rate_gradients(gw_C: Tensor, gu_C: Tensor, decay_C: Tensor, first_C: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The gradients of `decay` and `first` from those of `w` and `u`: what autograd makes of `rates`."""
    within = (decay_C.abs() <= LARGEST, (first_C / tokens).abs() <= LARGEST)
    gdecay_C = torch.where(within[0], gw_C / tokens, 0).to(decay_C.dtype)
    return gdecay_C, torch.where(within[1], gu_C / tokens, 0).to(first_C.dtype)


def working_dtype(k_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> torch.dtype:
    """The precision in which sums of weights neither overflow nor lose what a result shows.

    On a CPU float32 where the parameters are small. On other devices always float64: to look at the parameters there would
    mean to wait for the device.
    """
    if k_BTC.dtype == torch.float64 or k_BTC.device.type != "cpu":
        return torch.float64
    tokens = max(1, k_BTC.shape[1])
    largest = torch.maximum(decay_C.detach().abs(), first_C.detach().abs() / tokens)
    return torch.float32 if bool((largest <= SAFE_IN_FLOAT32).all()) else torch.float64
