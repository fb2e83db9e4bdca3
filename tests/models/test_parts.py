"""Every network says which of its tensors are the encoder's."""

import re
from functools import cache

import pytest
import torch
from torch import nn

from fedseg.models import build_model, list_models
from fedseg.models.registry import ARCHITECTURES

LABELS = 7
"""No layer inside a network has so many channels."""

SHALLOW = {"mlru++": {"depths": [1, 1]}, "unet": {"widths": [4, 8]}, "dynunet": {"widths": [4, 8, 16]}}
"""The fewest levels that each network may have; one without an entry has a fixed number."""

DEEP = {"mlru++": {"depths": [1] * 6}, "unet": {"widths": [4] * 6}, "dynunet": {"widths": [4] * 6}}
"""The most levels."""

OTHERS = {"unet": ({"norm": "batch", "residual_units": 1}, {"dropout": 0.1}), "dynunet": ({"residual": True},)}

CASES = [
    *((info.name, info.preset, {}) for info in list_models()),
    *((name, None, options) for name in ARCHITECTURES for options in (SHALLOW.get(name, {}), DEEP.get(name, {}))),
    *((name, None, options) for name, several in OTHERS.items() for options in several),
]

every_network = pytest.mark.parametrize(("name", "preset", "options"), CASES)


def network(name, preset, options):
    with torch.device("meta"):
        return build_model(name, preset=preset, num_labels=LABELS, **options)


@cache
def pattern(name):
    return re.compile(ARCHITECTURES[name].encoder)


@every_network
def test_a_network_has_an_encoder_and_a_decoder(name, preset, options):
    names = list(network(name, preset, options).state_dict())
    encoder = [tensor for tensor in names if pattern(name).search(tensor)]
    assert 0.2 < len(encoder) / len(names) < 0.8


@every_network
def test_what_shrinks_the_grid_is_in_the_encoder_and_what_enlarges_it_in_the_decoder(name, preset, options):
    shrinking, enlarging = 0, 0
    for module_name, module in network(name, preset, options).named_modules():
        if max(getattr(module, "stride", None) or [1]) > 1 and isinstance(module, nn.modules.conv._ConvNd):
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            assert bool(pattern(name).search(f"{module_name}.weight")) is not transposed, module_name
            shrinking += not transposed
            enlarging += transposed
    assert shrinking > 0
    assert enlarging > 0 or name.startswith("rwkv")  # whose decoder resizes without weights


@every_network
def test_the_layers_that_make_logits_are_in_the_decoder(name, preset, options):
    heads = [
        tensor
        for tensor, value in network(name, preset, options).state_dict().items()
        if tensor.endswith("weight") and value.dim() > 2 and LABELS in value.shape[:2]
    ]
    assert heads
    assert not any(pattern(name).search(tensor) for tensor in heads)


@every_network
def test_a_layer_is_in_one_part_only(name, preset, options):
    tensors = list(network(name, preset, options).state_dict())
    layers = {tensor.rpartition(".")[0] for tensor in tensors}
    for layer in layers:
        parts = {bool(pattern(name).search(t)) for t in tensors if t.rpartition(".")[0] == layer}
        assert len(parts) == 1, layer


@pytest.mark.parametrize("name", ["unet", "dynunet", "mlru++"])
def test_the_encoder_holds_what_sees_the_image_first(name):
    model = build_model(name, num_labels=LABELS, **SHALLOW[name])
    first = [tensor for tensor, value in model.state_dict().items() if value.dim() == 5 and value.shape[1] == 1]
    assert first  # none of these layers is depth-wise, so one channel is the image's
    assert all(pattern(name).search(tensor) for tensor in first)
