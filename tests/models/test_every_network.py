"""What every network of `list_models` promises, small enough to run all of them."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fedseg.federated.exchange import put_weights, take_weights
from fedseg.layers.conv import in_channels_last
from fedseg.models import build_model, count_parameters, list_models
from fedseg.models.registry import ARCHITECTURES

SMALLER = {
    "mlru++": {"base_width": 4, "depths": [1, 1, 1, 1], "decoder_depth": 1},
    "unet": {"widths": [4, 6, 8]},
    "dynunet": {"widths": [4, 6, 8, 10]},
    "rwkv-unet": {"depths": [2, 2, 2, 2], "widths": [6, 8, 12, 16], "stem_width": 4},
    "rwkv-unet-3d": {"depths": [2, 2, 2, 2], "widths": [6, 8, 12, 16], "stem_width": 4},
}
"""Options that make each network small; a network without an entry is built as its preset has it."""

CHANNELS, LABELS, SIZE = 3, 4, (9, 34, 13)

every_network = pytest.mark.parametrize(
    ("name", "preset"),
    [pytest.param(info.name, info.preset, id=f"{info.name}-{info.preset}") for info in list_models()],
)
every_kind = pytest.mark.parametrize("name", list(ARCHITECTURES))


def build(name, preset=None, **options):
    light = {} if preset == "light" else SMALLER.get(name, {})
    torch.manual_seed(0)
    return build_model(
        name,
        preset=preset,
        in_channels=CHANNELS,
        num_labels=LABELS,
        patch_size=options.pop("patch_size", (8, 32, 16)),
        deep_supervision=options.pop("deep_supervision", True),
        **{**light, **options},
    )


def images(batch=2, size=SIZE):
    return torch.randn(batch, CHANNELS, *size, generator=torch.Generator().manual_seed(1))


def outputs_of(model, image):
    outputs = model(image)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def loss_of(model, image):
    return sum(logits.float().square().mean() for logits in outputs_of(model, image))


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def test_a_network_is_listed_once_with_one_default():
    listed = [(info.name, info.preset) for info in list_models()]
    assert len(set(listed)) == len(listed)
    for name in ARCHITECTURES:
        assert sum(info.default for info in list_models() if info.name == name) == 1


@every_network
def test_odd_anisotropic_volumes_keep_their_size(name, preset):
    model = build(name, preset).eval()
    for size in (SIZE, (1, 5, 3), (8, 32, 16)):
        with torch.no_grad():
            logits = model(images(1, size))
        assert logits.shape == (1, LABELS, *size)
        assert logits.isfinite().all()


@every_network
def test_every_parameter_takes_part_in_training(name, preset):
    model = build(name, preset).train()
    loss_of(model, images()).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not idle


@every_network
def test_auxiliary_outputs_come_while_training_only_and_can_be_switched_off(name, preset):
    model = build(name, preset).train()
    weights = model.deep_supervision_weights
    outputs = outputs_of(model, images())
    assert len(outputs) == len(weights)
    assert sum(weights) == pytest.approx(1)
    assert sorted(weights, reverse=True) == list(weights)
    assert outputs[0].shape == (2, LABELS, *SIZE)
    for fine, coarse in itertools.pairwise(outputs):
        assert all(a >= b for a, b in zip(fine.shape[2:], coarse.shape[2:], strict=True))
    if len(outputs) > 1:
        model.deep_supervision = False
        assert model(images()).shape == (2, LABELS, *SIZE)
        model.deep_supervision = True
    assert model.eval()(images()).shape == (2, LABELS, *SIZE)


@every_network
def test_a_network_without_auxiliary_heads_has_one_output(name, preset):
    model = build(name, preset, deep_supervision=False).train()
    assert model(images()).shape == (2, LABELS, *SIZE)
    assert model.deep_supervision_weights == (1,)
    assert count_parameters(model) <= count_parameters(build(name, preset))


@every_network
def test_the_same_seed_gives_the_same_network(name, preset):
    one, two = build(name, preset).state_dict(), build(name, preset).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


@every_network
def test_weights_survive_their_journey(name, preset):
    sender, receiver = build(name, preset), build(name, preset)
    sender.train()
    with torch.no_grad():
        for tensor in sender.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
    weights = take_weights(sender)
    put_weights(receiver, weights)
    assert all(array.dtype == np.float32 for array in weights.values())
    with torch.no_grad():
        assert torch.equal(sender.eval()(images()), receiver.eval()(images()))


@every_kind
def test_no_tensor_travels_twice(name):
    model = build(name)
    travelling = [array.size for array in take_weights(model).values()]
    floats = {id(t): t.numel() for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()}
    assert sum(travelling) == sum(floats.values())


@every_kind
def test_bfloat16_autocast_is_close_to_single_precision(name):
    model = without_dropout(build(name)).train()
    with torch.no_grad():
        wanted = outputs_of(model, images())[0]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = outputs_of(model, images())
        loss = sum(logits.float().square().mean() for logits in outputs)
    loss.backward()
    correlation = torch.corrcoef(torch.stack([outputs[0].detach().float().flatten(), wanted.flatten()]))[0, 1]
    assert correlation > 0.98
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@every_kind
@pytest.mark.parametrize("batch", [1, 2])
def test_the_memory_layout_of_the_input_does_not_matter(name, batch):
    model = without_dropout(build(name)).double().train()
    found = []
    for image in (images(batch).double(), in_channels_last(images(batch).double())):
        model.zero_grad()
        loss_of(model, image).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@every_kind
def test_a_compiled_network_trains_as_the_plain_one(name):
    """Captured without a break; with our convolutions the backward pass is traced as well (with Bi-WKV: test_bi_wkv)."""
    torch.compiler.reset()
    shallow = {"mlru++": {"depths": [1, 1], "n_res": 1, "stem": [1, 2, 2]}}
    shallow |= {key: {"depths": [1, 1, 1, 2], "drop_path": 0.0} for key in ("rwkv-unet", "rwkv-unet-3d")}
    plain, compiled = (without_dropout(build(name, **shallow.get(name, {}))).train() for _ in range(2))
    compiled.compile(backend="aot_eager" if name == "mlru++" else "eager", fullgraph=True, dynamic=False)
    losses = [loss_of(model, images()) for model in (plain, compiled)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-2 * theirs.grad.abs().max().item() + 1e-5)


def test_inductor_runs_a_block():
    torch.compiler.reset()
    block = build("mlru++", "light", base_width=4, depths=[1, 1], n_res=1).encoder[0][0].eval()
    x = in_channels_last(torch.randn(2, 8, 3, 5, 4))
    compiled = torch.compile(block, dynamic=False, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-3, atol=1e-3)
