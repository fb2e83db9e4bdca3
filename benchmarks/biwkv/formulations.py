"""Other ways to compute Bi-WKV in PyTorch, for comparison: each is `(k_BTC, v_BTC, decay_C, first_C) -> y_BTC` with autograd.

All of them subtract each channel's largest key first, but `seq_lse`, which rescales as it goes. None is used by the library.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Formulation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def terms(k: Tensor, v: Tensor) -> Tensor:
    """`(e^k v, e^k)`, shifted: `(2, B, T, C)`."""
    weight = torch.exp(k - k.amax(dim=1, keepdim=True))
    return torch.stack([weight * v, weight])


def ratio(around: Tensor, x: Tensor, first: Tensor) -> Tensor:
    """The sums around each token, joined with its own term."""
    num, den = around + torch.exp(first / x.shape[2]) * x
    return num / den


def seq_lse(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """The textbook loop: token after token in both directions, with a running maximum."""
    tokens = k.shape[1]
    w, u = decay / tokens, first / tokens

    def sweep(order: range) -> list[tuple[Tensor, Tensor, Tensor]]:
        num, den = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
        top = torch.full_like(k[:, 0], -1e38)
        states = []
        for t in order:
            states.append((num, den, top))
            new = torch.maximum(top - w, k[:, t])
            old, own = torch.exp(top - w - new), torch.exp(k[:, t] - new)
            num, den, top = old * num + own * v[:, t], old * den + own, new
        return states

    before, behind = sweep(range(tokens)), sweep(range(tokens - 1, -1, -1))[::-1]
    rows = []
    for t, ((num_p, den_p, top_p), (num_s, den_s, top_s)) in enumerate(zip(before, behind, strict=True)):
        top = torch.maximum(torch.maximum(top_p, top_s), k[:, t] + u)
        parts = torch.exp(top_p - top), torch.exp(top_s - top), torch.exp(k[:, t] + u - top)
        num = parts[0] * num_p + parts[1] * num_s + parts[2] * v[:, t]
        rows.append(num / (parts[0] * den_p + parts[1] * den_s + parts[2]))
    return torch.stack(rows, dim=1)


def seq_gmax(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """The loop with one shift per channel."""
    x, lam = terms(k, v), torch.exp(-decay / k.shape[1])

    def sweep(slabs: list[Tensor]) -> list[Tensor]:
        states = [torch.zeros_like(slabs[0])]
        for slab in slabs[:-1]:
            states.append(torch.addcmul(slab, states[-1], lam))
        return states

    slabs = list(x.unbind(2))
    before, behind = sweep(slabs), sweep(slabs[::-1])[::-1]
    return ratio(torch.stack(before, 2) + torch.stack(behind, 2), x, first)


def full_matrix(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """One T x T matrix of weights per channel."""
    x, tokens = terms(k, v), k.shape[1]
    t = torch.arange(tokens, dtype=k.dtype)
    gaps = (t[:, None] - t).abs() - 1
    weights = torch.exp(-(decay / tokens)[:, None, None] * gaps)
    weights = torch.where(gaps < 0, torch.exp(first / tokens)[:, None, None], weights)
    num, den = torch.bmm(weights, x.permute(3, 2, 0, 1).flatten(2)).unflatten(2, x.shape[:2]).permute(2, 3, 1, 0)
    return num / den


def _kernel(decay: Tensor, first: Tensor, tokens: int) -> Tensor:
    """Weights of all distances `-(T - 1) .. T - 1`: `(C, 2T - 1)`."""
    gaps = torch.arange(1 - tokens, tokens, dtype=decay.dtype).abs() - 1
    weights = torch.exp(-(decay / tokens)[:, None] * gaps)
    return torch.where(gaps < 0, torch.exp(first / tokens)[:, None], weights)


def conv1d(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """A depth-wise convolution whose kernel is twice as long as the sequence."""
    x, tokens = terms(k, v), k.shape[1]
    kernel = _kernel(decay, first, tokens)[:, None]
    sums = F.conv1d(x.flatten(0, 1).mT, kernel, padding=tokens - 1, groups=k.shape[2])
    num, den = sums.mT.unflatten(0, x.shape[:2])
    return num / den


def fft(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """The same convolution in Fourier space; loses small sums behind large ones."""
    x, tokens = terms(k, v).mT, k.shape[1]
    size = 2 ** math.ceil(math.log2(3 * tokens - 2)) if tokens > 1 else 1
    spectrum = torch.fft.rfft(x, size) * torch.fft.rfft(_kernel(decay, first, tokens), size)
    num, den = torch.fft.irfft(spectrum, size)[..., tokens - 1 : 2 * tokens - 1].mT
    return num / den


def assoc(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """PyTorch's associative scan over pairs of decay and sum."""
    from torch._higher_order_ops import associative_scan

    x = terms(k, v)
    lam = torch.exp(-decay / k.shape[1]).expand_as(x)

    def join(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return one[0] * other[0], one[1] * other[0] + other[1]

    def before(x: Tensor) -> Tensor:
        _, sums = associative_scan(join, (lam, x), dim=2, combine_mode="generic")
        return F.pad(sums[:, :, :-1], (0, 0, 1, 0))

    return ratio(before(x) + before(x.flip(2)).flip(2), x, first)


def doubling(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """Sums over 1, 2, 4, ... tokens: log2 T shifted additions."""
    x, tokens = terms(k, v), k.shape[1]

    def before(x: Tensor) -> Tensor:
        sums, step = F.pad(x[:, :, :-1], (0, 0, 1, 0)), 1
        while step < tokens:
            sums = sums + torch.exp(-decay / tokens * step) * F.pad(sums[:, :, :-step], (0, 0, step, 0))
            step *= 2
        return sums

    return ratio(before(x) + before(x.flip(2)).flip(2), x, first)


def cumsum(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """Two cumulative sums of terms scaled by `e^{+-w t}`, centred in the middle."""
    x, tokens = terms(k, v), k.shape[1]
    place = torch.arange(tokens, dtype=k.dtype)[:, None] - tokens / 2
    rise, fall = torch.exp(decay / tokens * place), torch.exp(-decay / tokens * (place - 1))

    def before(x: Tensor) -> Tensor:
        return F.pad(torch.cumsum(x * rise, 2)[:, :, :-1], (0, 0, 1, 0)) * fall

    return ratio(before(x) + before(x.flip(2)).flip(2), x, first)


def two_level(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """Chunks: a small Toeplitz matrix inside, another one between them, and what enters each chunk added at the end."""
    x, tokens = terms(k, v), k.shape[1]
    w = decay / tokens
    length = next(n for n in range(math.isqrt(tokens - 1) + 1, tokens + 1) if tokens % n == 0)
    number = tokens // length
    inner, outer = torch.arange(length, dtype=k.dtype), torch.arange(number, dtype=k.dtype)
    by_channel = x.permute(3, 2, 0, 1).flatten(2).unflatten(1, (number, length))  # C, n, L, 2B

    gaps = (inner[:, None] - inner).abs() - 1
    own = torch.where(gaps < 0, torch.exp(first / tokens)[:, None, None], torch.exp(-w[:, None, None] * gaps))
    local = own[:, None] @ by_channel
    rising = torch.exp(-w[:, None] * (length - 1 - inner))
    to_end = torch.einsum("cl,cnlb->cnb", rising, by_channel)
    to_start = torch.einsum("cl,cnlb->cnb", rising.flip(1), by_channel)
    steps = outer[:, None] - outer - 1
    far = torch.exp(-(w * length)[:, None, None] * steps.clamp(min=0)) * (steps >= 0)
    enters, leaves = far @ to_end, far.mT @ to_start
    fade = torch.exp(-w[:, None] * inner)
    around = local + fade[:, None, :, None] * enters[:, :, None] + fade.flip(1)[:, None, :, None] * leaves[:, :, None]
    num, den = around.flatten(1, 2).unflatten(2, x.shape[:2]).permute(2, 3, 1, 0)
    return num / den


FORMULATIONS: dict[str, Formulation] = {
    one.__name__: one for one in (seq_lse, seq_gmax, full_matrix, conv1d, fft, assoc, doubling, cumsum, two_level)
}


def is_feasible(name: str, batch: int, tokens: int, channels: int) -> bool:
    """Whether a formulation ends within seconds and gigabytes, from what it must at least compute and hold."""
    if name == "full_matrix":
        return channels * tokens**2 * 4 * 3 < 3e9
    if name == "conv1d":
        return 2 * batch * channels * tokens**2 < 2e9
    if name == "seq_lse":
        return tokens <= 1024 and batch == 1
    if name == "seq_gmax":
        return tokens <= 1024
    if name == "assoc":
        return batch * tokens * channels < 5e6
    return True
