"""Bi-WKV out of a few plain tensor operations: what an exported network consists of, and the first implementation of all.

Two cumulative sums of terms scaled by `exp(+-w t)`, centred in the middle of the sequence so that no exponent exceeds half
the decay. See `fedseg.layers.kernels` for the equation.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_DECAY = 60.0
"""Beyond it, float32 sums of scaled terms lose their small ones."""


def bi_wkv_plain(k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> Tensor:
    """Bi-WKV with autograd; memory linear in tokens."""
    tokens = k_BTC.shape[1]
    working = torch.promote_types(k_BTC.dtype, torch.float32)
    k_BTC, v = k_BTC.to(working), v_BTC.to(working)
    decay = decay_C.to(working).clamp(-LARGEST_DECAY, LARGEST_DECAY)
    weight = torch.exp(k_BTC - k_BTC.amax(dim=1, keepdim=True))
    place = torch.arange(tokens, device=k_BTC.device, dtype=working)[:, None] - tokens / 2
    rise = torch.exp(decay / tokens * place)
    fall = torch.exp(-decay / tokens * (place - 1))

    def before(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.pad(torch.cumsum(x * up, dim=1)[:, :-1], (0, 0, 1, 0)) * down

    def everywhere(x: Tensor) -> Tensor:
        behind = before(x.flip(1), rise, fall).flip(1)
        return before(x, rise, fall) + behind + torch.exp(first_C.to(working) / tokens) * x

    return (everywhere(weight * v) / everywhere(weight)).to(v_BTC.dtype)
