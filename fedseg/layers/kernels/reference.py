"""Bi-WKV by its definition: what every other implementation is compared with. Quadratic in tokens, in float64."""

import torch
from torch import Tensor

from fedseg.layers.kernels.rates import rates


def bi_wkv_reference(k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> Tensor:
    """Attention of every token to every other, with autograd. See `fedseg.layers.kernels` for the equation."""
    tokens = k_BTC.shape[1]
    w_C, u_C = rates(decay_C, first_C, tokens, torch.float64)
    place = torch.arange(tokens, device=k_BTC.device)
    distance_TT = (place[:, None] - place).abs()
    bias_CTT = torch.where(distance_TT == 0, u_C[:, None, None], -w_C[:, None, None] * (distance_TT - 1))
    weight_BCTT = torch.softmax(k_BTC.double().mT[:, :, None, :] + bias_CTT, dim=-1)
    y_BCT = (weight_BCTT @ v_BTC.double().mT[..., None])[..., 0]
    return y_BCT.mT.to(v_BTC.dtype)
