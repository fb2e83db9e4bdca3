"""Networks by name: `build_model("mlru++", preset="light", num_labels=3)`.

torch is imported when a network is built, not with this package, so that configurations can be checked without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedseg.models.registry import ModelInfo, check_counts, check_model, list_models, resolve

if TYPE_CHECKING:
    import torch

__all__ = ["ModelInfo", "build_model", "check_model", "count_parameters", "list_models", "load_published"]


def build_model(
    name: str,
    *,
    preset: str | None = None,
    in_channels: int = 1,
    num_labels: int,
    patch_size: tuple[int, int, int] | None = None,
    deep_supervision: bool = True,
    **options: Any,
) -> torch.nn.Module:
    """Build a network with fresh weights; the same seed gives the same weights.

    All networks take `(B, C, D, H, W)` of any size. In evaluation mode they return logits `(B, K, D, H, W)`; in training
    mode, if `model.deep_supervision` is true, a tuple of logits, finest first, whose losses are to be weighted with
    `model.deep_supervision_weights`.

    Args:
        name: one of `list_models`.
        preset: one of that network's presets; None: its default.
        in_channels: channels of the input.
        num_labels: output channels, background included.
        patch_size: `(D, H, W)` of the usual input, the home of position embeddings; None: the preset's.
        deep_supervision: build auxiliary heads, where the network has them.
        options: keyword arguments of the network that replace the preset's.

    Raises:
        ModelError: unknown name, preset or option, or a value that does not fit.
    """
    architecture, found, joined = resolve(name, preset, options)
    check_counts(name, in_channels, num_labels)
    factory = getattr(importlib.import_module(architecture.module), architecture.factory)
    size = found.patch_size if patch_size is None else patch_size
    model: torch.nn.Module = factory(in_channels, num_labels, size, deep_supervision=deep_supervision, **joined)
    return model


def load_published(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Load weights that the authors of a network released, by their names.

    Raises:
        ModelError: the network has no released counterpart, or names or shapes do not fit; nothing is loaded then.
    """
    from fedseg.models.published import load

    load(model, state_dict)


def count_parameters(model: torch.nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
