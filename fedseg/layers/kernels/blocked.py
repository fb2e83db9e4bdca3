"""Bi-WKV in PyTorch, with an analytic backward pass: two scans by blocks. Needs no compiler.

With x = (e^k v, e^k), one exponential per element, and lam = e^-w, all there is to compute are the sums before and behind
each token,

    P_{t+1} = lam P_t + x_t,    S_{t-1} = lam S_t + x_t,    z_t = P_t + S_t + e^u x_t,    y = z_num / z_den.

T tokens are n blocks of L, both about sqrt(T): L steps scan all blocks at once, n steps carry sums from block to block, and
one step adds what was carried. So 4 sqrt(T) operations on large tensors do what 2 T on small ones would. Within a tile of
samples and channels, numbers lie as `(L, 2, B, n, C)`: each step reads and writes memory without gaps. Tiles follow one
another in the same buffers, so that memory beyond the results stays small.

The matrix of weights is symmetric, therefore the backward pass consists of the same scans, of g' = gy / z_den and of g' y.
It recomputes the sums of x: only the inputs are kept for it.

On other devices than a CPU the scans are cumulative sums in float64: few launches, and no overflow there.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fedseg.layers.kernels.rates import rate_gradients, rates, working_dtype
from fedseg.layers.kernels.registry import Gradients, register

TILE = 1 << 19
"""Elements that are computed at once; tuned for a CPU's caches."""


def _forward(k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> Tensor:
    y_BTC = v_BTC.new_empty(v_BTC.shape)
    dtype = working_dtype(k_BTC, decay_C, first_C)
    w_C, u_C = rates(decay_C, first_C, k_BTC.shape[1], dtype)
    buffers = _Buffers(3, dtype, k_BTC.device)
    for samples, channels in _tiles(k_BTC):
        at = (samples, slice(None), channels)
        tile = _Tile(k_BTC[at], v_BTC[at], w_C[channels], u_C[channels], buffers)
        num, den = tile.everywhere(into=tile.before).unbind(1)
        _join(num.div_(den), y_BTC[at])
    return y_BTC


def _backward(gy_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> Gradients:
    gk_BTC, gv_BTC = k_BTC.new_empty(k_BTC.shape), v_BTC.new_empty(v_BTC.shape)
    dtype = working_dtype(k_BTC, decay_C, first_C)
    w_C, u_C = rates(decay_C, first_C, k_BTC.shape[1], dtype)
    gw_C, gu_C = torch.zeros_like(w_C, dtype=torch.float64), torch.zeros_like(u_C, dtype=torch.float64)
    buffers = _Buffers(6, dtype, k_BTC.device)
    for samples, channels in _tiles(k_BTC):
        at = (samples, slice(None), channels)
        tile = _Tile(k_BTC[at], v_BTC[at], w_C[channels], u_C[channels], buffers)
        gk, gv = tile.gradients(_split(gy_BTC[at]), gw_C[channels], gu_C[channels])
        _join(gk, gk_BTC[at])
        _join(gv, gv_BTC[at])
    gw_C, gu_C = gw_C * -torch.exp(-w_C), gu_C * torch.exp(u_C)
    return gk_BTC, gv_BTC, *rate_gradients(gw_C, gu_C, decay_C, first_C, k_BTC.shape[1])


bi_wkv_torch = register("bi_wkv_torch", _forward, _backward)


def _tiles(x_BTC: Tensor) -> Iterator[tuple[slice, slice]]:
    """Samples and channels that are computed at once."""
    batch, tokens, channels = x_BTC.shape
    if x_BTC.device.type != "cpu":
        yield slice(0, batch), slice(0, channels)
        return
    width = min(channels, max(16, TILE // tokens))
    height = max(1, TILE // (tokens * width)) if width == channels else 1
    for sample in range(0, batch, height):
        for channel in range(0, channels, width):
            yield slice(sample, sample + height), slice(channel, channel + width)


class _Buffers:
    """Memory that the tiles take one after another."""

    def __init__(self, number: int, dtype: torch.dtype, device: torch.device) -> None:
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._buffers: list[Tensor] = [self._like] * number

    def __call__(self, index: int, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if self._buffers[index].numel() < size:
            self._buffers[index] = self._like.new_empty(size)
        return self._buffers[index][:size].view(shape)


class _Tile:
    """The sums of some samples and channels; in the buffers until the next tile takes them."""

    def __init__(self, k_BTC: Tensor, v_BTC: Tensor, w_C: Tensor, u_C: Tensor, buffers: _Buffers) -> None:
        self.w_C, self.bonus_C, self._buffers = w_C, torch.exp(u_C), buffers
        k_LBnC, self.v_LBnC = _split(k_BTC.to(w_C.dtype), -math.inf), _split(v_BTC)
        self.shape = (k_LBnC.shape[0], 2, *k_LBnC.shape[1:])
        self.x = buffers(0, self.shape)
        weighted, weight = self.x.unbind(1)
        torch.sub(k_LBnC, k_BTC.amax(dim=1)[:, None], out=weight)
        torch.mul(weight.exp_(), self.v_LBnC, out=weighted)
        self.before, self.behind = self._scan(self.x, 1)

    def everywhere(self, into: Tensor) -> Tensor:
        """`z`: numerator and denominator of every token."""
        return torch.add(self.before, self.behind, out=into).addcmul_(self.x, self.bonus_C)

    def gradients(self, gy_LBnC: Tensor, gw_C: Tensor, gu_C: Tensor) -> tuple[Tensor, Tensor]:
        """Those of k and v; what belongs to `-gw / lam` and `gu / e^u` is added to the sums."""
        g = self.everywhere(into=self._buffers(3, self.shape))
        num, den = g.unbind(1)
        y = num.div_(den)
        scaled = torch.div(gy_LBnC, den)
        torch.mul(y, scaled, out=den)
        y.copy_(scaled)  # now g holds (g', g' y)

        g_before, g_behind = self._scan(g, 4)
        products = self.before.mul_(g_behind).addcmul_(self.behind, g_before)
        gw_C.add_(_difference(products).sum((0, 1, 2)))
        products = torch.mul(g, self.x, out=self.before)
        gu_C.add_(_difference(products).sum((0, 1, 2)))
        q = g_before.add_(g_behind).addcmul_(g, self.bonus_C).mul_(self.x[:, 1:])
        gv, rest = q.unbind(1)
        return rest.neg_().addcmul_(gv, self.v_LBnC.to(gv.dtype)), gv

    def _scan(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The sums before and behind each token, in two buffers from the first on."""
        before, behind = self._buffers(first, self.shape), self._buffers(first + 1, self.shape)
        scan = _scan_by_blocks if x.device.type == "cpu" else _scan_at_once
        scan(x, self.w_C, before, behind)
        return before, behind


def _scan_by_blocks(x: Tensor, w_C: Tensor, before: Tensor, behind: Tensor) -> None:
    length, number = x.shape[0], x.shape[3]
    lam_C = torch.exp(-w_C)
    before[0] = 0
    behind[-1] = 0
    for at in range(1, length):
        torch.addcmul(x[at - 1], before[at - 1], lam_C, out=before[at])
        torch.addcmul(x[-at], behind[-at], lam_C, out=behind[-at - 1])
    if number > 1:
        place = torch.arange(length, device=x.device, dtype=x.dtype).view(length, 1, 1, 1, 1)
        fade = torch.exp(-w_C * place)
        far_C = torch.exp(-w_C * length)
        before.addcmul_(_carried(torch.addcmul(x[-1], before[-1], lam_C), far_C), fade)
        behind.addcmul_(_carried(torch.addcmul(x[0], behind[0], lam_C).flip(2), far_C).flip(2), fade.flip(0))


def _carried(of_blocks: Tensor, far_C: Tensor) -> Tensor:
    """What enters each block from those before it, from the sums within the blocks, `(2, B, n, C)`."""
    carried = torch.zeros_like(of_blocks)
    for block in range(1, carried.shape[2]):
        torch.addcmul(of_blocks[:, :, block - 1], carried[:, :, block - 1], far_C, out=carried[:, :, block])
    return carried


def _scan_at_once(x: Tensor, w_C: Tensor, before: Tensor, behind: Tensor) -> None:
    """Cumulative sums of terms scaled by `e^{+-w t}`, centred in the middle of a single block."""
    length = x.shape[0]
    place = torch.arange(length, device=x.device, dtype=x.dtype).view(length, 1, 1, 1, 1) - length / 2
    rise, fall = torch.exp(w_C * place), torch.exp(-w_C * (place - 1))
    for found, terms in ((before, x), (behind, x.flip(0))):
        found[0] = 0
        torch.mul(torch.cumsum(terms * rise, dim=0)[:-1], fall[1:], out=found[1:])
    behind.copy_(behind.flip(0))


def _difference(products: Tensor) -> Tensor:
    one, other = products.unbind(1)
    return one.sub_(other)


def _split(x_BTC: Tensor, filler: float = 0.0) -> Tensor:
    """The tokens as `(L, B, n, C)`, a view but where they do not fill the blocks."""
    batch, tokens, channels = x_BTC.shape
    number, length = _blocks(x_BTC)
    if number * length > tokens:
        x_BTC = F.pad(x_BTC, (0, 0, 0, number * length - tokens), value=filler)
    return x_BTC.view(batch, number, length, channels).permute(2, 0, 1, 3)


def _join(x_LBnC: Tensor, into_BTC: Tensor) -> None:
    """Undo `_split`."""
    x_BnLC = x_LBnC.permute(1, 2, 0, 3)
    if x_BnLC.shape[1] * x_BnLC.shape[2] == into_BTC.shape[1]:
        into_BTC.view(x_BnLC.shape).copy_(x_BnLC)
    else:
        into_BTC.copy_(x_BnLC.flatten(1, 2)[:, : into_BTC.shape[1]])


def _blocks(x_BTC: Tensor) -> tuple[int, int]:
    """Number and length of the blocks: equal ones if a length between sqrt(T) and twice that divides T."""
    tokens = x_BTC.shape[1]
    if x_BTC.device.type != "cpu":
        return 1, tokens
    least = math.isqrt(tokens - 1) + 1
    length = next((length for length in range(least, 2 * least) if tokens % length == 0), least)
    return -(-tokens // length), length
