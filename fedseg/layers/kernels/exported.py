"""Bi-WKV out of a few plain tensor operations: what an exported network consists of.

Two cumulative sums of terms scaled by `exp(+-w t)`, centred in the middle of the sequence so that no exponent exceeds half
the decay. See `fedseg.layers.kernels` for the equation.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_DECAY, LARGEST_BONUS = 60.0, 40.0
"""Of larger ones these are taken: beyond them, scaled terms leave the range of float32."""


def bi_wkv_plain(k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> Tensor:
    """Bi-WKV with autograd; memory linear in tokens."""
    tokens = k_BTC.shape[1]
    dtype = torch.float64 if k_BTC.dtype == torch.float64 else torch.float32
    k_BTC, v = k_BTC.to(dtype), v_BTC.to(dtype)
    decay = decay_C.to(dtype).clamp(-LARGEST_DECAY, LARGEST_DECAY)
    bonus = (first_C.to(dtype) / tokens).clamp(-LARGEST_BONUS, LARGEST_BONUS)
    lift = F.relu(decay) / 2  # falling weights only make sums smaller, so these may start higher
    weight = torch.exp(k_BTC - k_BTC.amax(dim=1, keepdim=True) + lift)
    x = torch.stack([weight * v, weight])
    w, place = decay / tokens, torch.arange(tokens, device=k_BTC.device, dtype=dtype)[:, None] - tokens / 2
    sums = torch.cumsum(torch.stack([x, x.flip(2)]) * torch.exp(w * place), dim=3)
    before, behind = F.pad(sums[..., :-1, :] * torch.exp(w * (1 - place[1:])), (0, 0, 1, 0))
    num, den = before + behind.flip(2) + torch.exp(bonus) * x
    y_BTC: Tensor = (num / den).to(v_BTC.dtype)
    return y_BTC
