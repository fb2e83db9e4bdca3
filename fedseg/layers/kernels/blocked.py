"""Bi-WKV in PyTorch, with an analytic backward pass: two scans by blocks. Needs no compiler.

With x = (e^k v, e^k), one exponential per element, and lam = e^-w, all there is to compute are the sums before and behind
each token,

    P_{t+1} = lam P_t + x_t,    S_{t-1} = lam S_t + x_t,    z_t = P_t + S_t + e^u x_t,    y = z_num / z_den.

T tokens are n blocks of L, both about sqrt(T): L steps scan all blocks at once, n steps carry sums from block to block, and
one step adds what was carried. So 4 sqrt(T) operations on large tensors do what 2 T on small ones would.

The matrix of weights is symmetric, therefore the backward pass consists of the same scans, of g' = gy / z_den and of g' y.
It recomputes the sums of x: only the inputs are kept for it.
"""

import math

import torch
from torch import Tensor

from fedseg.layers.kernels.rates import rate_gradients, rates, working_dtype
from fedseg.layers.kernels.registry import Gradients, register


def _forward(k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> Tensor:
    dtype = working_dtype(k_BTC, decay_C, first_C)
    w_C, u_C = rates(decay_C, first_C, k_BTC.shape[1], dtype)
    x = _terms(k_BTC, v_BTC, dtype)
    before, behind = _scan(x, w_C)
    num, den = _everywhere(before, behind, x, u_C, into=before)[:, :, : k_BTC.shape[1]]
    return torch.div(num, den).to(v_BTC.dtype)


def _backward(gy_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> Gradients:
    tokens = k_BTC.shape[1]
    dtype = working_dtype(k_BTC, decay_C, first_C)
    w_C, u_C = rates(decay_C, first_C, tokens, dtype)
    x = _terms(k_BTC, v_BTC, dtype)
    before, behind = _scan(x, w_C)
    g = _everywhere(before, behind, x, u_C, into=torch.empty_like(x))
    num, den = g[:, :, :tokens]
    scaled = gy_BTC / den
    torch.mul(num.div_(den), scaled, out=den)
    num.copy_(scaled)
    g[:, :, tokens:] = 0

    g_before, g_behind = _scan(g, w_C)
    found = before.mul_(g_behind).addcmul_(behind, g_before)
    gw_C = torch.sub(*found).sum((0, 1)).mul_(-torch.exp(-w_C))
    found = torch.mul(g, x, out=behind)
    gu_C = torch.sub(*found).sum((0, 1)).mul_(torch.exp(u_C))
    gv, gk = _everywhere(g_before, g_behind, g, u_C, into=g_before).mul_(x[1])[:, :, :tokens]
    gk_BTC = torch.mul(gv, v_BTC).sub_(gk)
    gv_BTC = gv.to(v_BTC.dtype, memory_format=torch.contiguous_format, copy=True)
    return gk_BTC.to(k_BTC.dtype), gv_BTC, *rate_gradients(gw_C, gu_C, decay_C, first_C, tokens)


bi_wkv_torch = register("bi_wkv_torch", _forward, _backward)


def _terms(k_BTC: Tensor, v_BTC: Tensor, dtype: torch.dtype) -> Tensor:
    """`(e^k v, e^k)`, shifted by each channel's largest key, filled up with zeros: `(2, B, n L, C)`."""
    batch, tokens, channels = k_BTC.shape
    padded = math.prod(_blocks(tokens))
    x = k_BTC.new_empty((2, batch, padded, channels), dtype=dtype)
    x[:, :, tokens:] = 0
    weighted, weight = x[:, :, :tokens]
    k_BTC = k_BTC.to(dtype)
    torch.sub(k_BTC, k_BTC.amax(dim=1, keepdim=True), out=weight)
    torch.mul(weight.exp_(), v_BTC, out=weighted)
    return x


def _everywhere(before: Tensor, behind: Tensor, x: Tensor, u_C: Tensor, into: Tensor) -> Tensor:
    return torch.add(before, behind, out=into).addcmul_(x, torch.exp(u_C))


def _blocks(tokens: int) -> tuple[int, int]:
    """Number and length of the blocks, which divide the tokens if any length between sqrt(T) and twice that does."""
    least = math.isqrt(tokens - 1) + 1
    length = next((length for length in range(least, 2 * least) if tokens % length == 0), least)
    return -(-tokens // length), length


def _scan(x: Tensor, w_C: Tensor) -> tuple[Tensor, Tensor]:
    """The sums before and behind each token of `(S, B, n L, C)`."""
    return _scan_by_blocks(x, w_C) if x.device.type == "cpu" else _scan_at_once(x, w_C)


def _scan_by_blocks(x: Tensor, w_C: Tensor) -> tuple[Tensor, Tensor]:
    number, length = _blocks(x.shape[2])
    x = x.view(*x.shape[:2], number, length, x.shape[3])
    before, behind = torch.empty_like(x), torch.empty_like(x)
    lam_C = torch.exp(-w_C)
    before[..., 0, :] = 0
    behind[..., -1, :] = 0
    for at in range(1, length):
        torch.addcmul(x[..., at - 1, :], before[..., at - 1, :], lam_C, out=before[..., at, :])
        torch.addcmul(x[..., -at, :], behind[..., -at, :], lam_C, out=behind[..., -at - 1, :])
    if number > 1:
        place_L1 = torch.arange(length, device=x.device, dtype=x.dtype)[:, None]
        fade_LC = torch.exp(-w_C * place_L1)
        far_C = torch.exp(-w_C * length)
        of_blocks = torch.addcmul(x[..., -1, :], before[..., -1, :], lam_C)
        before.addcmul_(_carried(of_blocks, far_C), fade_LC)
        of_blocks = torch.addcmul(x[..., 0, :], behind[..., 0, :], lam_C)
        behind.addcmul_(_carried(of_blocks.flip(2), far_C).flip(2), fade_LC.flip(0))
    return before.flatten(2, 3), behind.flatten(2, 3)


def _carried(of_blocks: Tensor, far_C: Tensor) -> Tensor:
    """What enters each block from those before it: `(S, B, n, C)` to `(S, B, n, 1, C)`."""
    carried = torch.zeros_like(of_blocks)
    for block in range(1, carried.shape[2]):
        torch.addcmul(of_blocks[:, :, block - 1], carried[:, :, block - 1], far_C, out=carried[:, :, block])
    return carried[..., None, :]


def _scan_at_once(x: Tensor, w_C: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative sums of terms scaled by `e^{+-w t}`, centred in the middle: few launches, but only float64 bears it."""
    place = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)[:, None] - x.shape[2] / 2
    rise, fall = torch.exp(w_C * place), torch.exp(-w_C * (place - 1))

    def before(x: Tensor) -> Tensor:
        shifted = torch.nn.functional.pad((x * rise).cumsum(2)[:, :, :-1], (0, 0, 1, 0))
        return shifted.mul_(fall)

    return before(x), before(x.flip(2)).flip(2)
