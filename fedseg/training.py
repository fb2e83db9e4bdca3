"""What a site does between two exchanges: steps of gradient descent, with FedProx's pull towards the global weights.

FedProx (Li et al. 2020, arXiv:1812.06127) adds (mu/2) * sum ||w - w_global||^2 over the trainable parameters to the
loss. Its gradient is mu * (w - w_global), so it is added to the gradients after the backward pass and before clipping:
nothing joins the autograd graph, and mu = 0 is FedAvg bit for bit.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from fedseg.config import TrainingConfig
from fedseg.device import autocast
from fedseg.errors import ConfigError, ModelError, TrainingDiverged
from fedseg.losses import DiceCrossEntropy
from fedseg.schedule import learning_rate

T = TypeVar("T")

MAX_SKIPPED_STEPS = 20
"""So many fp16 steps in a row without a finite gradient count as divergence; the loss scale halves at each of them."""


class Batch(Protocol):
    """Patches as the sampler yields them."""

    @property
    def image(self) -> Tensor:
        """`(B, C, D, H, W)`, float32."""

    @property
    def label(self) -> Tensor:
        """`(B, 1, D, H, W)`, label values."""


@dataclass(frozen=True)
class TrainingReport:
    """What one call of `train_locally` did; all means are 0 if it took no step."""

    steps: int
    """Batches that were trained on."""
    cases: int
    """Patches in those batches, each counted as often as it was seen."""
    loss: float
    """Mean over steps of Dice + cross-entropy before each step; the proximal term is not in it."""
    gradient_norm: float
    """Mean L2 norm of the gradient before clipping, the proximal term's gradient included."""
    seconds: float
    """Wall-clock seconds, all told."""
    data_seconds: float
    """Those of them that were spent waiting for batches."""


def train_locally(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainingConfig,
    *,
    anchor: Mapping[str, Tensor] | None = None,
    proximal_mu: float = 0.0,
    unanchored: Collection[str] = (),
    correction: Mapping[str, Tensor] | None = None,
    progress: float = 0.0,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainingReport:
    """Train a model in place, one step per batch, with a new optimizer state.

    The same seed (`fedseg.device.seed_everything`), weights and batches give the same weights bit for bit on a CPU.

    Args:
        model: moved to `device` and left there in training mode, in which it returns logits `(B, K, D, H, W)` or a
            tuple of them, full resolution first; `deep_supervision_weights`, if it has them, weigh the outputs.
        batches: one step each; a lazy iterable makes the next batch while a GPU still computes the last step.
        config: optimizer, schedule, clipping, precision; the patch's size is the sampler's business.
        anchor: the global weights by parameter name; needed if `proximal_mu > 0`, else not looked at.
        proximal_mu: FedProx's mu; 0 is plain local training.
        unanchored: names of parameters that FedProx does not pull, and that the anchor may lack.
        correction: SCAFFOLD's c - c_i by parameter name, added to every gradient after clipping.
        progress: position of this call in the federation, `(round - 1) / rounds`; decides the learning rate.
        device: where to train.
        on_step: called with the number of steps so far (1, 2, ...) and that step's loss.
        should_stop: asked before every step; once it says yes, training ends and the report covers the steps taken.

    Raises:
        TrainingDiverged: a loss or gradient is not finite.
        ConfigError: fp16 on a CPU, mu < 0 or without an anchor, progress outside [0, 1].
        ModelError: the anchor lacks a parameter or has another shape.
    """
    started = time.perf_counter()
    device = torch.device(device)
    model.to(device).train()
    if device.type == "cuda" and config.precision != "fp32":
        use_channels_last(model)
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    weights = list(trainable.values())
    pulled = {name: weight for name, weight in trainable.items() if name not in unanchored}
    anchors = _anchors(pulled, anchor, proximal_mu)
    corrections = {name: control.to(device) for name, control in (correction or {}).items()}
    optimizer = _optimizer(weights, config, learning_rate(config, progress))
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    criterion = DiceCrossEntropy(getattr(model, "deep_supervision_weights", None))
    context = autocast(device, config.precision)
    meter = _Meter(on_step, may_skip=scaler.is_enabled())
    stopwatch = _Stopwatch()
    cases = 0
    for batch in stopwatch.time(batches, should_stop):
        optimizer.zero_grad(set_to_none=True)
        with context:
            output = model(_move(batch.image, device))
        outputs = (output,) if isinstance(output, Tensor) else tuple(output)
        loss = criterion(outputs if config.deep_supervision else outputs[:1], _move(batch.label, device))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if proximal_mu > 0:
            add_proximal_gradient(list(pulled.values()), anchors, proximal_mu)
        norm = nn.utils.clip_grad_norm_(weights, config.clip_norm or math.inf)
        for name, control in corrections.items():
            add_correction(trainable[name], control)
        scaler.step(optimizer)
        scaler.update()
        meter.add(loss.detach(), norm)
        cases += len(batch.image)
    optimizer.zero_grad(set_to_none=True)
    meter.flush()
    return TrainingReport(
        steps=meter.steps,
        cases=cases,
        loss=meter.loss,
        gradient_norm=meter.gradient_norm,
        seconds=time.perf_counter() - started,
        data_seconds=stopwatch.seconds,
    )


@torch.no_grad()
def add_proximal_gradient(weights: Sequence[Tensor], anchors: Sequence[Tensor], proximal_mu: float) -> None:
    """Add `mu * (w - anchor)` to the gradients in place; a parameter without a gradient gets this one."""
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if gradients and gradients[0].is_cuda:  # a few launches for all parameters
        torch._foreach_add_(gradients, torch._foreach_sub(list(weights), list(anchors)), alpha=proximal_mu)
        return
    for weight, gradient, anchor in zip(weights, gradients, anchors, strict=True):  # one small temporary at a time
        gradient.add_(weight - anchor, alpha=proximal_mu)


@torch.no_grad()
def add_correction(weight: nn.Parameter, control: Tensor) -> None:
    """Add a control variate to a gradient in place; a parameter without a gradient gets this one."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    weight.grad.add_(control)


def use_channels_last(model: nn.Module) -> None:
    """Store 3D convolutions' weights channels-last, in place; the networks' 2D ones keep their layout."""
    for weight in model.parameters():
        if weight.dim() == 5:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)


def _anchors(trainable: Mapping[str, Tensor], anchor: Mapping[str, Tensor] | None, proximal_mu: float) -> list[Tensor]:
    """Copies of the anchor on the weights' device and in their memory layout, in the weights' order."""
    if proximal_mu == 0:
        return []
    if proximal_mu < 0 or not math.isfinite(proximal_mu):
        raise ConfigError(f"proximal_mu must be finite and not negative, got {proximal_mu}")
    if anchor is None:
        raise ConfigError(f"proximal_mu = {proximal_mu} needs an anchor, the global weights; got none")
    copies = []
    for name, weight in trainable.items():
        if name not in anchor:
            raise ModelError(f"the anchor lacks the parameter {name!r}")
        if anchor[name].shape != weight.shape:
            raise ModelError(f"the anchor's {name!r} must be {tuple(weight.shape)}, got {tuple(anchor[name].shape)}")
        copies.append(torch.empty_like(weight, requires_grad=False).copy_(anchor[name]))
    return copies


def _optimizer(weights: list[nn.Parameter], config: TrainingConfig, rate: float) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=rate, weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(
        weights,
        lr=rate,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device; from pinned memory, since other copies wait for the GPU to finish its work."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class _Meter:
    """Running means of loss and gradient norm, read one step late so that the GPU never waits for the reading."""

    def __init__(self, on_step: Callable[[int, float], None] | None, *, may_skip: bool) -> None:
        self.steps = 0
        self._on_step = on_step
        self._may_skip = may_skip
        self._skipped = 0
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._pending: tuple[Tensor, Tensor] | None = None

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.flush()
        self._pending = (loss, norm)

    def flush(self) -> None:
        if self._pending is None:
            return
        loss, norm = (float(value) for value in self._pending)
        self._pending = None
        self.steps += 1
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if not math.isfinite(loss) or self._skipped > (MAX_SKIPPED_STEPS if self._may_skip else 0):
            raise TrainingDiverged(
                f"step {self.steps}: loss {loss}, gradient norm {norm}; "
                "try a lower learning rate, a smaller clip_norm or precision fp32"
            )
        self._losses.append(loss)
        if math.isfinite(norm):
            self._norms.append(norm)
        if self._on_step is not None:
            self._on_step(self.steps, loss)

    @property
    def loss(self) -> float:
        return math.fsum(self._losses) / max(len(self._losses), 1)

    @property
    def gradient_norm(self) -> float:
        return math.fsum(self._norms) / max(len(self._norms), 1)


class _Stopwatch:
    """Seconds spent waiting for an iterable."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self, items: Iterable[T], should_stop: Callable[[], bool] | None) -> Iterator[T]:
        iterator = iter(items)
        while should_stop is None or not should_stop():
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            yield item
