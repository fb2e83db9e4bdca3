"""Bi-WKV on GPUs, in Triton: three launches forward, four backward, memory linear in tokens.

See `fedseg.layers.kernels` for the equation. To walk over the tokens in sequence would leave a GPU idle when the batch is
small. So the tokens are cut into chunks: sum up every chunk, carry the sums across chunks in both directions, apply them
inside every chunk. The weight of one token in the output of another depends on their distance only, so the backward pass is
the same three steps on g' = gy / denominator and g' y. It works outputs and denominators out again from the carried sums,
which is cheaper than to have stored them.

Sums are float32 whatever the inputs are, nothing is added up atomically, and nothing is read back to the host: results repeat
to the last bit, and CUDA graphs can record it. The kernels are in `triton_kernels`; Triton is imported on first use.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fedseg.errors import ModelError
from fedseg.layers.kernels.rates import LARGEST

_LARGEST_FADE = 25
"""The most that |w| adds up to within a chunk: float32 has room for three times that with digits to spare."""

_LARGEST_BONUS = 30
"""The most that |u| may be where tokens share a chunk. A parameter `first` is beyond it only above 30 T."""

_ROWS, _GROUPS, _WIDTH = 8, 8, 32

_ROOM_FOR_TWO = {"maxnreg": 128} if torch.version.cuda else {}
"""Registers per thread such that a multiprocessor has room for two of the largest programs; spills about ten words."""

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def unavailable() -> str | None:
    """Why this cannot run here, or None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return None if _interprets() else "no CUDA device; TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests"
    version = str(import_module("triton").__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 3):
        return f"Triton 3.3 or newer is needed, found {version}"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (7, 0):
        return f"compute capability 7.0 or newer is needed, {torch.cuda.get_device_name()} is older"
    return None


def bi_wkv_triton(k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> Tensor:
    """Bi-WKV of `(B, T, C)` keys and values, with autograd; the result has the dtype of the values.

    Any keys will do. Decays beyond +-300, and values of `first` beyond +-30 T (300 T for less than 24 tokens), count as
    that much and have no gradient.

    Args:
        k_BTC: float32, bfloat16 or float16 keys, of any strides; copied first unless channels are neighbours in memory.
        v_BTC: values, likewise.
        decay_C: how fast weights fall from one end of the sequence to the other, in nats; negative: they rise.
        first_C: extra weight of a token for itself, times T.

    Raises:
        ModelError: another dtype, or tensors that are not on a GPU.
    """
    for name, x in (("keys", k_BTC), ("values", v_BTC)):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(f"Bi-WKV in Triton takes {name} of float32, bfloat16 or float16, got {x.dtype}")
    if k_BTC.device.type == "cpu" and not _interprets():
        raise ModelError("Bi-WKV in Triton takes tensors on a GPU, got keys on the CPU")
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y: Tensor = _Function.apply(k_BTC, v_BTC, decay_C, first_C)  # type: ignore[no-untyped-call]
    else:
        y = torch.ops.fedseg.bi_wkv_triton(k_BTC, v_BTC, decay_C, first_C)[0]
    return y


def _forward(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and for the backward pass the carried sums and the largest keys."""
    y, carries, top = _outputs(k, v, decay, first)
    if not k.numel():
        return y, carries, top
    k, v, decay, first = _rows(k), _rows(v), decay.contiguous(), first.contiguous()
    sizes = (*k.shape[1:], carries.shape[2])
    strides = (*k.stride()[:2], *v.stride()[:2])
    sums = torch.empty_like(carries[:, 1:])
    per_chunk, per_line, chunk, line = _launches(*k.shape)
    kernels = _kernels()
    with _on(k):
        kernels.chunk_sums[per_chunk](k, v, decay, sums, *sizes, *strides, **chunk)
        kernels.carry[per_line](sums, carries, decay, top, *sizes, FROM_TOP=True, **line)
        kernels.mix[per_chunk](
            k, v, decay, first, carries, top, y, *sizes, *strides, LIMIT_U=_largest_bonus(k.shape[1]), **chunk
        )
    return y, carries, top


def _backward(
    gy: Tensor, k: Tensor, v: Tensor, decay: Tensor, first: Tensor, carries: Tensor, top: Tensor
) -> _Gradients:
    """The gradients of keys, values, decay and first, each in the dtype of its input."""
    gk, gv, gdecay, gfirst = _gradients(gy, k, v, decay, first, carries, top)
    if not k.numel():
        return gk, gv, gdecay.zero_(), gfirst.zero_()
    k, v, gy = _rows(k), _rows(v), _rows(gy)
    parameters = (decay.contiguous(), first.contiguous())
    (batch, tokens, channels), chunks = k.shape, carries.shape[2]
    sizes = (tokens, channels, chunks)
    strides = (*k.stride()[:2], *v.stride()[:2], *gy.stride()[:2])
    sums = torch.empty_like(carries[:, 1:])
    gradient_carries = torch.empty_like(carries)
    shares = k.new_empty(2, batch, chunks, channels, dtype=torch.float32).unbind()
    per_chunk, per_line, chunk, line = _launches(*k.shape)
    limit_u = _largest_bonus(tokens)
    kernels = _kernels()
    with _on(k):
        kernels.gradient_sums[per_chunk](
            k, v, gy, *parameters, carries, top, sums, *sizes, *strides, LIMIT_U=limit_u, **chunk
        )
        kernels.carry[per_line](sums, gradient_carries, parameters[0], top, *sizes, FROM_TOP=False, **line)
        kernels.gradients[per_chunk](
            k, v, gy, *parameters, carries, top, gradient_carries, gk, gv, *shares, *sizes, *strides,
            LIMIT_U=limit_u, **chunk, **_ROOM_FOR_TWO,
        )  # fmt: skip
        kernels.parameter_gradients[(-(-channels // _WIDTH),)](
            *shares, *parameters, gdecay, gfirst, tokens, channels, batch * chunks,
            LIMIT=chunk["LIMIT"], LIMIT_U=limit_u, WIDTH=_WIDTH, num_warps=4,
        )  # fmt: skip
    return gk, gv, gdecay, gfirst


def _outputs(k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the results of `_forward`."""
    del decay, first
    batch, tokens, channels = k.shape
    length = _length(tokens)
    carries = k.new_empty(batch, 6, (tokens + length - 1) // length, channels, dtype=torch.float32)
    return v.new_empty(v.shape), carries, k.new_empty(batch, channels, dtype=torch.float32)


def _gradients(
    gy: Tensor, k: Tensor, v: Tensor, decay: Tensor, first: Tensor, carries: Tensor, top: Tensor
) -> _Gradients:
    """Empty tensors for the results of `_backward`."""
    del gy, carries, top
    return k.new_empty(k.shape), v.new_empty(v.shape), decay.new_empty(decay.shape), first.new_empty(first.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def _differentiate(ctx: Any, gy: Tensor, *_: Tensor) -> _Gradients:
    found: _Gradients = torch.ops.fedseg.bi_wkv_triton_backward(gy, *ctx.saved_tensors)
    return found


class _Function(torch.autograd.Function):
    """The operator outside compilers, where PyTorch's autograd for operators costs more than the kernels do."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        output = torch.ops.fedseg.bi_wkv_triton(*inputs)
        _remember(ctx, inputs, output)
        y: Tensor = output[0]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gy: Tensor) -> _Gradients:
        return _differentiate(ctx, gy)


torch.library.define("fedseg::bi_wkv_triton", "(Tensor k, Tensor v, Tensor d, Tensor f) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "fedseg::bi_wkv_triton_backward",
    "(Tensor gy, Tensor k, Tensor v, Tensor d, Tensor f, Tensor c, Tensor t) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("fedseg::bi_wkv_triton", "CompositeExplicitAutograd", _forward)
torch.library.impl("fedseg::bi_wkv_triton_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_fake("fedseg::bi_wkv_triton", _outputs)
torch.library.register_fake("fedseg::bi_wkv_triton_backward", _gradients)
torch.library.register_autograd("fedseg::bi_wkv_triton", _differentiate, setup_context=_remember)


def _length(tokens: int) -> int:
    """Tokens of a chunk, a power of two."""
    length = _ROWS * _GROUPS
    while length > 1 and length * int(LARGEST) > tokens * _LARGEST_FADE:
        length //= 2
    return length


def _largest_bonus(tokens: int) -> int:
    return _LARGEST_BONUS if _length(tokens) > 1 else int(LARGEST)


def _launches(batch: int, tokens: int, channels: int) -> tuple[tuple[int], tuple[int], dict[str, int], dict[str, int]]:
    """Programs with a chunk each, programs that walk over the chunks in one direction each, and options for both."""
    length = _length(tokens)
    rows = min(_ROWS, length)
    blocks = batch * -(-channels // _WIDTH)
    common = {"LIMIT": int(LARGEST), "WIDTH": _WIDTH}
    chunk = common | {"ROWS": rows, "GROUPS": length // rows, "num_warps": length // rows}
    line = common | {"LENGTH": length, "num_warps": 1}
    return (blocks * -(-tokens // length),), (2 * blocks,), chunk, line


def _rows(x: Tensor) -> Tensor:
    """The same values with neighbouring channels; rows may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernels() -> ModuleType:
    return import_module("fedseg.layers.kernels.triton_kernels")
