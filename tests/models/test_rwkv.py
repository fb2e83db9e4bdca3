"""RWKV-UNet against the equations (`rwkv_by_the_book`), its released names, and what the network promises besides."""

import functools
import hashlib
import itertools
import json
import math

import pytest
import torch
from torch import nn

from fedseg.errors import ModelError
from fedseg.layers.drop_path import DropPath
from fedseg.layers.rwkv import SpatialMix
from fedseg.models import build_model, count_parameters, load_published
from fedseg.models.published import published_names, released_shape
from tests.models.rwkv_by_the_book import forward

LABELS = 9
SIZES = {"t": [(64, 64), (48, 80)], "s": [(48, 80)], "b": [(32, 32)]}
SMALL = {"depths": [2, 2, 2, 2], "widths": [6, 8, 12, 16], "stem_width": 4}
COUNTS = {"t": 3_145_961, "s": 9_702_145, "b": 17_125_713}
LAYOUTS = {
    "t": "7442fb3caaa73c6c86b8b801e6a17c54a3c20a2716764165b9d20688e3c9fdb3",
    "s": "cff7ea1fb8276d6ce6b05597ce101071faca19ba1ee249bef7076f69c4f37f38",
    "b": "d9419ee0e8780154e16f467aef4dee879b47f6adcff1c010a8c6d2c01f3cae08",
}
"""Digest of the sorted names and shapes of all tensors of a released checkpoint that its network reads."""
PARTS = {
    "stem": (192, 192, 192),
    "stages.0": (14_224, 20_240, 33_936),
    "stages.1": (32_600, 70_560, 98_424),
    "stages.2": (1_244_544, 3_599_872, 7_717_104),
    "stages.3": (1_646_912, 5_725_184, 8_844_384),
    "ccm": (58_384, 61_504, 130_584),
    "decoder.0": (54_752, 78_016, 112_848),
    "decoder.1": (62_496, 103_808, 128_304),
    "decoder.2": (20_512, 31_424, 39_984),
    "decoder.3": (11_120, 11_120, 19_728),
    "head": (225, 225, 225),
}
every_size = pytest.mark.parametrize("size", ["t", "s", "b"])
every_shape = pytest.mark.parametrize(
    ("size", "shape"), [pytest.param(s, shape, id=f"{s}-{shape[0]}x{shape[1]}") for s in SIZES for shape in SIZES[s]]
)


def build(size="t", name="rwkv-unet", in_channels=1, **options):
    torch.manual_seed(0)
    return build_model(name, preset=size, in_channels=in_channels, num_labels=LABELS, **options)


def on_meta(size, name="rwkv-unet"):
    with torch.device("meta"):
        return build(size, name)


def volume(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(model, shape):
    """A float64 network in which no parameter is inert, with statistics of its own features in its batch norms."""
    model = model.double().train()
    generator = torch.Generator().manual_seed(2)

    def normal(like):
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            kind = name.rpartition(".")[2]
            if kind in ("decay", "first"):
                tensor.copy_(5 * normal(tensor))
            elif kind.startswith("mix_"):
                tensor.copy_(0.5 + 0.4 * normal(tensor))
            elif kind == "bias":
                tensor.copy_(0.3 * normal(tensor))
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.3 * normal(tensor))
            else:
                tensor.copy_(normal(tensor) * math.sqrt(2 / tensor[0].numel()))
        for seed in range(2):
            model(0.5 + 2 * volume(*shape, seed=10 + seed))
    return model


@functools.cache
def shared(size="t", in_channels=1):
    """A randomised network without stochastic depth; tests leave it as it is."""
    return randomised(build(size, in_channels=in_channels, drop_path=0.0), (2, in_channels, 1, 32, 48)).eval()


@pytest.fixture(autouse=True, scope="module")
def _forget_the_shared_networks():
    yield
    shared.cache_clear()


def released(model, gradients=False):
    """The network's tensors by their released names and in their released shapes."""
    parameters = dict(model.named_parameters())
    names, state = published_names(model), {}
    for ours, tensor in model.state_dict().items():
        theirs = names[ours]
        shape = (1, 1, *tensor.shape) if ".spatial_mix_" in theirs else tensor.shape
        state[theirs] = tensor.detach().clone().reshape(shape).requires_grad_(gradients and ours in parameters)
    return state


def book(model, image_BCDHW, training=False):
    """What the equations make of each slice of a volume."""
    slices = image_BCDHW.movedim(2, 1)
    logits = forward(released(model), slices.flatten(0, 1), training)
    return logits.unflatten(0, slices.shape[:2]).movedim(1, 2)


# ---------------------------------------------------------------- the equations


@every_shape
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_logits_are_those_of_the_equations(size, shape, training):
    model, image = shared(size), volume(2, 1, 1, *shape)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with torch.no_grad():
            wanted = book(model, image, training)
            found = model.train(training)(image)
    finally:
        model.load_state_dict(before)
        model.eval()
    assert found.shape == (2, LABELS, 1, *shape)
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() < 1e-10 * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize(("size", "shape"), [("t", (48, 80)), ("s", (32, 48)), ("b", (32, 32))])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_are_those_of_the_equations(size, shape, training):
    model, image = shared(size), volume(2, 1, 1, *shape)
    wanted = released(model, gradients=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    target = volume(2, LABELS, 1, *shape, seed=3)
    try:
        model.zero_grad()
        ((model.train(training)(image) - target) ** 2).mean().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
    finally:
        model.load_state_dict(before)
        model.eval().zero_grad()
    ((forward(wanted, image[:, :, 0], training) - target[:, :, 0]) ** 2).mean().backward()
    names = published_names(model)
    largest = max(gradient.abs().max() for gradient in found.values())
    assert found.keys() == {ours for ours, theirs in names.items() if wanted[theirs].requires_grad}
    for ours, gradient in found.items():
        theirs = wanted[names[ours]].grad.reshape(gradient.shape)
        # batch statistics take away what a bias in front of them adds: such gradients are zero but for rounding
        bound = 1e-6 * theirs.abs().max() + (1e-12 * largest if training else 0)
        assert (gradient - theirs).abs().max() <= bound, ours
        assert training or theirs.any(), ours


def test_slices_are_a_batch_of_images():
    model, image = shared(), volume(2, 1, 3, 32, 48)
    with torch.no_grad():
        found = model(image)
        for b in range(2):
            for d in range(3):
                alone = forward(released(model), image[b : b + 1, :, d])[0]
                torch.testing.assert_close(found[b, :, d], alone, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- channels, axes, sizes


def test_one_channel_is_repeated_to_three():
    model, grey = shared(), volume(1, 1, 2, 32, 32)
    colours = build(in_channels=3, drop_path=0.0).double().eval()
    colours.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(colours(grey.repeat(1, 3, 1, 1, 1)), model(grey), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_more_channels_enter_a_stem_of_as_many(channels):
    model, image = shared(in_channels=channels), volume(1, channels, 2, 48, 32)
    assert released(model)["encoder.stage0.0.conv_local.conv.weight"].shape == (channels, 1, 5, 5)
    with torch.no_grad():
        assert (model(image) - book(model, image)).abs().max() < 1e-10


def test_channels_are_told_apart():
    model, image = shared(in_channels=3), volume(1, 3, 1, 32, 32)
    with torch.no_grad():
        assert (model(image) - model(image.flip(1))).abs().max() > 0.01


@pytest.mark.parametrize(("axis", "at"), [("H", 3), ("W", 4)])
def test_slicing_along_another_axis_is_turning_the_volume(axis, at):
    model = shared()
    turned = build(slice_axis=axis, drop_path=0.0).double().eval()
    turned.load_state_dict(model.state_dict())
    image = volume(2, 1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(turned(image.movedim(2, at)), model(image).movedim(2, at), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 37, 50), (2, 16, 17), (1, 5, 3)])
def test_any_size_is_padded_evenly_by_border_copies_and_cropped(shape):
    model, image = shared(), volume(1, 1, *shape)
    margins = [(-length % 16) // 2 for length in shape[1:]]
    rows, columns = (
        (torch.arange(length + -length % 16) - margin).clamp(0, length - 1)
        for length, margin in zip(shape[1:], margins, strict=True)
    )
    with torch.no_grad():
        whole = book(model, image[:, :, :, rows][..., columns])
        found = model(image)
    wanted = whole[:, :, :, margins[0] :, margins[1] :][:, :, :, : shape[1], : shape[2]]
    assert found.shape == (1, LABELS, *shape)
    assert (found - wanted).abs().max() < 1e-10


# ---------------------------------------------------------------- what is built


@every_size
def test_parameters_are_as_many_as_the_paper_s_network_trains(size):
    model, at = on_meta(size), "tsb".index(size)
    assert count_parameters(model) == COUNTS[size] == sum(counts[at] for counts in PARTS.values())
    assert {part: count_parameters(model.get_submodule(part)) for part in PARTS} == {
        part: counts[at] for part, counts in PARTS.items()
    }


@every_size
def test_released_names_and_shapes_are_those_of_the_released_checkpoint(size):
    model = on_meta(size)
    names = published_names(model)
    tensors = model.state_dict()
    assert names.keys() == tensors.keys()
    layout = sorted([theirs, list(released_shape(theirs, tensors[ours]))] for ours, theirs in names.items())
    assert hashlib.sha256(json.dumps(layout).encode()).hexdigest() == LAYOUTS[size]


@every_size
def test_stochastic_depth_grows_from_block_to_block(size):
    depths = {"t": (2, 2, 4, 2), "s": (3, 3, 6, 3), "b": (3, 3, 6, 3)}[size]
    rates, wanted = torch.linspace(0, 0.05, sum(depths)).tolist(), []
    for depth in depths:
        wanted += [rates.pop(0) for _ in range(depth)][1:]  # a stage's first block has no branch to drop
    model = on_meta(size)
    found = [module.p for module in model.stages.modules() if isinstance(module, DropPath)]
    assert found == pytest.approx(wanted)
    assert [module.p for module in model.ccm.modules() if isinstance(module, DropPath)] == [0.05]


def test_a_fresh_network_is_initialised_as_the_released_one():
    model = build()
    encoder = [model.stem, model.stages]
    for part in (*encoder, model.ccm, model.decoder, model.head):
        for module in part.modules():
            if isinstance(module, nn.Linear) and part in encoder:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                bound = 1 / math.sqrt(module.weight[0].numel())
                assert module.weight.abs().max() <= bound
                if module.weight.numel() > 500:
                    assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    constants = {"decay": 0, "first": 0, "mix_key": 0.5, "mix_value": 0.5, "mix_receptance": 0.5}
    named = {name: parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] in constants}
    assert len(named) == 4 * 5 + 2  # four blocks with a spatial mix, and the channel mix
    for name, parameter in named.items():
        assert (parameter == constants[name.rpartition(".")[2]]).all()


@every_size
def test_batch_statistics_move_as_in_the_released_network(size):
    norms = [module for module in on_meta(size).modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.1, 1e-6)}


# ---------------------------------------------------------------- released weights


def with_dead_tensors(state):
    """The same with tensors that the released code stores and never reads."""
    dead = ["encoder.stage1.1.att.key.weight", "encoder.stage1.1.att.spatial_mix_k", "encoder.stage3.0.ln1.weight"]
    dead += [
        "encoder.stage3.1.ln2.weight",
        "encoder.stage3.1.ln2.bias",
        "decoder1.ln1.weight",
        "decoder2.att.key.weight",
    ]
    dead += ["encoder.norm.weight", "encoder.norm.bias", "encoder.head.weight", "encoder.head.bias"]
    assert not state.keys() & set(dead)
    return state | {name: torch.full((3, 5), 1e6) for name in dead}


def in_parallel(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("prefix", "dead"), [(dict, dict), (in_parallel, with_dead_tensors)], ids=["plain", "parallel-dead"]
)
def test_a_released_checkpoint_gives_its_network(tmp_path, prefix, dead):
    model, fresh, image = shared(), build(drop_path=0.0).double().eval(), volume(1, 1, 2, 32, 32)
    torch.save(prefix(dead(released(model))), tmp_path / "released.pth")
    load_published(fresh, torch.load(tmp_path / "released.pth", weights_only=True))
    with torch.no_grad():
        assert torch.equal(fresh(image), model(image))
        assert (fresh(image) - book(model, image)).abs().max() < 1e-10
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["encoder.stage3.1.att.spatial_decay", "ccm.ln1.weight", "encoder.stage4.1.ln1.bias"])
def test_a_missing_tensor_that_is_read_is_named_and_nothing_is_loaded(name):
    state = with_dead_tensors(released(shared()))
    del state[name]
    refused(state, rf"missing: {name}$")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("encoder.stage3.1.att.spatial_mix_k", (288,), r"is \(288,\), not \(1, 1, 288\)"),
        ("encoder.stage0.0.conv.conv.weight", (3, 1, 1, 1), r"is \(3, 1, 1, 1\), not \(3, 3, 1, 1\)"),
        ("final_conv.weight", (4, 24, 1, 1), r"is \(4, 24, 1, 1\), not \(9, 24, 1, 1\)"),
    ],
)
def test_a_tensor_of_another_shape_is_named_and_nothing_is_loaded(name, shape, message):
    refused({**released(shared()), name: torch.zeros(shape)}, rf"of another shape: {name} {message}$")


def test_an_unknown_tensor_is_named_and_nothing_is_loaded():
    refused(
        {**released(shared()), "decoder5.conv.conv.weight": torch.zeros(1)}, r"unknown: decoder5\.conv\.conv\.weight$"
    )


@pytest.mark.parametrize("size", ["s", "b"])
def test_a_checkpoint_of_another_size_is_refused(size):
    names, tensors = published_names(on_meta(size)), on_meta(size).state_dict()
    state = {theirs: torch.zeros(released_shape(theirs, tensors[ours])) for ours, theirs in names.items()}
    refused(state, r"unknown: encoder\.stage1\.2\..*of another shape: .*encoder\.stage")


def refused(state, message):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=rf"does not fit this RWKVUNet, nothing was loaded; .*{message}"):
        load_published(model, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------- volumes


@every_size
def test_the_network_of_volumes_is_hardly_larger_than_that_of_images(size):
    assert count_parameters(on_meta(size, "rwkv-unet-3d")) <= 1.2 * COUNTS[size]


def test_every_parameter_of_the_network_of_volumes_learns():
    model = randomised(build(name="rwkv-unet-3d", drop_path=0.0, **SMALL), (1, 1, 32, 32, 32)).eval()
    model(volume(1, 1, 32, 32, 32)).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    largest = max(gradient.abs().max() for gradient in gradients.values())
    still = [name for name, gradient in gradients.items() if gradient.abs().max() < 1e-10 * largest]
    assert not still  # more than rounding


@pytest.mark.parametrize("shape", [(5, 17, 33), (16, 1, 7)])
def test_odd_volumes_are_padded_evenly_by_border_copies_and_cropped(shape):
    model = randomised(build(name="rwkv-unet-3d", drop_path=0.0, **SMALL), (1, 1, 16, 32, 16)).eval()
    image, margins = volume(1, 1, *shape), [(-length % 16) // 2 for length in shape]
    padded = image
    for axis, (length, margin) in enumerate(zip(shape, margins, strict=True), start=2):
        padded = padded.index_select(axis, (torch.arange(length + -length % 16) - margin).clamp(0, length - 1))
    with torch.no_grad():
        wanted, found = model(padded), model(image)
    for axis, (length, margin) in enumerate(zip(shape, margins, strict=True), start=2):
        wanted = wanted.narrow(axis, margin, length)
    assert found.shape == (1, LABELS, *shape)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def orders(model):
    return [module.order for module in model.modules() if isinstance(module, SpatialMix)]


@every_size
def test_blocks_of_volumes_walk_along_every_axis_and_those_of_images_along_rows(size):
    assert {order[-1] for order in orders(on_meta(size, "rwkv-unet-3d"))} == {0, 1, 2}
    assert set(orders(on_meta(size))) == {(0, 1)}


@pytest.mark.parametrize("size", ["t", "s", "b"])
def test_no_block_of_a_volume_walks_along_the_axis_of_the_block_before(size):
    assert all(one[-1] != two[-1] for one, two in itertools.pairwise(orders(on_meta(size, "rwkv-unet-3d"))))


def test_the_network_of_volumes_has_no_released_weights():
    with pytest.raises(ModelError, match="RWKVUNet3d has no released counterpart"):
        load_published(on_meta("t", "rwkv-unet-3d"), {})
