"""How an implementation of Bi-WKV becomes an operator of PyTorch: with autograd, and opaque to compilers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(k, v, decay, first) -> y`."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of k, v, decay, first, each in its input's dtype."""

Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Gradients]
"""`(gy, k, v, decay, first) -> gradients`."""


def register(name: str, forward: Forward, backward: Backward) -> Forward:
    """Register `fedseg::{name}` and its backward pass, and return what calls it.

    An operator is what torch.compile and friends need, but PyTorch's autograd for such operators costs about 60 us a call. So
    outside compilers an `autograd.Function` of lower cost calls the same operator.

    Args:
        name: of the operator.
        forward: gives a contiguous `y`.
        backward: gives contiguous gradients; it recomputes what it needs, so that only the inputs are kept.
    """
    forwards, backwards = f"fedseg::{name}", f"fedseg::{name}_backward"
    torch.library.define(forwards, "(Tensor k, Tensor v, Tensor decay, Tensor first) -> Tensor")
    torch.library.define(
        backwards, "(Tensor gy, Tensor k, Tensor v, Tensor decay, Tensor first) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    torch.library.impl(forwards, "CompositeExplicitAutograd", forward)
    torch.library.impl(backwards, "CompositeExplicitAutograd", backward)
    torch.library.register_fake(forwards, lambda *inputs: inputs[1].new_empty(inputs[1].shape))
    torch.library.register_fake(backwards, lambda *inputs: tuple(x.new_empty(x.shape) for x in inputs[1:]))
    operator = getattr(torch.ops.fedseg, name).default
    gradient = getattr(torch.ops.fedseg, f"{name}_backward").default

    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
        ctx.save_for_backward(*inputs)

    def differentiate(ctx: Any, gy: Tensor) -> Gradients:
        found: Gradients = gradient(gy, *ctx.saved_tensors)
        return found

    torch.library.register_autograd(forwards, differentiate, setup_context=keep)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            ctx.save_for_backward(*inputs)
            y: Tensor = operator(*inputs)
            return y

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gy: Tensor) -> Gradients:
            return differentiate(ctx, gy)

    def call(k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y: Tensor = Function.apply(k_BTC, v_BTC, decay_C, first_C)  # type: ignore[no-untyped-call]
        else:
            y = operator(k_BTC, v_BTC, decay_C, first_C)
        return y

    return call
