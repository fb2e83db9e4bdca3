"""MLRU++ (arXiv 2507.16122): the released sizes, and gradients that are right at any batch size and in any layout."""

import math

import pytest
import torch
from torch import nn

from fedseg.models import build_model, count_parameters
from fedseg.models.mlru import LCBAM, M2B, Block, FoldedAttention, fold_shape, resize_position

PRESETS = ("synapse", "acdc", "lung", "tumor")
CHANNELS = {"synapse": (1, 14), "btcv": (1, 14), "acdc": (1, 4), "lung": (1, 2), "tumor": (4, 4)}


def released(preset):
    in_channels, num_labels = CHANNELS[preset]
    with torch.device("meta"):
        return build_model("mlru++", preset=preset, in_channels=in_channels, num_labels=num_labels)


def small(**options):
    chosen = {
        "base_width": 4,
        "depths": [1, 1, 1],
        "decoder_depth": 1,
        "stem": [1, 2, 2],
        "in_channels": 1,
        "num_labels": 3,
        "patch_size": (4, 8, 24),
        **options,
    }
    torch.manual_seed(0)
    return build_model("mlru++", preset="acdc", **chosen)


# ------------------------------------------------------------------------------------------------ released sizes


@pytest.mark.parametrize(
    ("preset", "total", "tensors"),
    [
        ("synapse", 46_087_124, 783),
        ("btcv", 46_087_124, 783),
        ("acdc", 44_260_182, 783),
        ("lung", 56_460_400, 783),
        ("tumor", 28_518_294, 657),
    ],
)
def test_presets_have_the_released_number_of_parameters(preset, total, tensors):
    model = released(preset)
    assert count_parameters(model) == total
    assert len(list(model.parameters())) == tensors


@pytest.mark.parametrize(
    ("size", "options", "total"),
    [
        ((96, 96, 96), {"preset": "synapse", "num_labels": 14}, 44_789_204),
        ((96, 96, 96), {"preset": "synapse", "num_labels": 14, "n_res": 1}, 27_196_628),
    ],
)
def test_other_sizes_have_the_derived_number_of_parameters(size, options, total):
    with torch.device("meta"):
        assert count_parameters(build_model("mlru++", patch_size=size, **options)) == total


MODULES = {
    "downs.0": (1_088, 576, 576, 8_256),
    "downs.1": (16_512,) * 4,
    "downs.2": (65_792,) * 4,
    "downs.3": (262_656,) * 4,
    "encoder.0": (3_503_526, 2_815_398, 7_435_686, 3_337_254),
    "encoder.1": (2_196_006, 2_023_974, 3_179_046, 1_531_686),
    "encoder.2": (5_795_622, 5_752_614, 6_041_382, 3_139_878),
    "encoder.3": (22_367_526, 22_356_774, 22_428_966, 11_747_622),
    "skip": (7_360, 7_360, 7_360, 8_704),
    "ups.3 decoder.2": (6_057_766, 6_014_758, 6_303_526, 3_402_022),
    "ups.2 decoder.1": (2_261_542, 2_089_510, 3_244_582, 1_597_222),
    "ups.1 decoder.0": (3_519_910, 2_831_782, 7_452_070, 3_353_638),
    "ups.0 last": (30_208, 22_016, 22_016, 46_592),
    "heads.0": (238, 68, 34, 68),
    "heads.1": (462, 132, 66, 132),
    "heads.2": (910, 260, 130, 260),
}


@pytest.mark.parametrize("column", range(4), ids=PRESETS)
def test_every_module_has_the_released_number_of_parameters(column):
    model = released(PRESETS[column])
    for names, counts in MODULES.items():
        assert sum(count_parameters(model.get_submodule(name)) for name in names.split()) == counts[column], names


def test_acdc_has_the_released_shapes_at_every_stage():
    model = released("acdc").train()
    shapes = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, y, name=name: shapes.__setitem__(name, tuple(y.shape[1:])))
    for hook in model._forward_hooks.copy():
        model._forward_hooks.pop(hook)
    outputs = model(torch.empty(1, 1, 16, 160, 160, device="meta"))
    assert [tuple(logits.shape[1:]) for logits in outputs] == [(4, 16, 160, 160), (4, 16, 40, 40), (4, 8, 20, 20)]
    expected = {
        "downs.0": (32, 16, 40, 40),
        "downs.1": (64, 8, 20, 20),
        "downs.2": (128, 4, 10, 10),
        "downs.3": (256, 2, 5, 5),
        "ups.3": (128, 4, 10, 10),
        "ups.2": (64, 8, 20, 20),
        "ups.1": (32, 16, 40, 40),
        "ups.0": (16, 16, 160, 160),
        "skip": (16, 16, 160, 160),
        "last": (16, 16, 160, 160),
        "encoder.0.0.attention.gate": (32, 160, 160),
        "encoder.1.0.attention.gate": (64, 56, 58),
        "encoder.2.0.attention.scales": (128, 20, 20),
        "encoder.3.0.attention.scales": (256, 7, 8),
    }
    assert {name: shapes[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("tokens", "folded"),
    [
        (32768, (181, 182, 174)),
        (4096, (64, 64, 0)),
        (512, (22, 24, 16)),
        (64, (8, 8, 0)),
        (25600, (160, 160, 0)),
        (3200, (56, 58, 48)),
        (400, (20, 20, 0)),
        (50, (7, 8, 6)),
        (73728, (271, 273, 255)),
        (9216, (96, 96, 0)),
        (1152, (33, 35, 3)),
        (144, (12, 12, 0)),
        (1, (1, 1, 0)),
    ],
)
def test_voxels_fold_into_the_released_images(tokens, folded):
    assert fold_shape(tokens) == folded


def test_outputs_are_weighted_by_four_two_one_sevenths():
    model = released("acdc")
    assert model.deep_supervision_weights == pytest.approx((4 / 7, 2 / 7, 1 / 7))
    model.deep_supervision = False
    assert model.deep_supervision_weights == (1,)


def test_initial_weights_are_spread_as_released():
    model = small(base_width=16, depths=[2, 1, 1], num_labels=14)
    encoder, decoder = model.encoder[1][0], model.decoder[1][0]
    assert (encoder.gamma == 1e-6).all()
    assert not encoder.position.any()
    gate, scales = encoder.attention.gate, encoder.attention.scales
    for layer in (gate.squeeze, gate.excite, gate.spatial, scales.expand, *scales.scales, scales.reduce):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.25)
    scales = decoder.attention.scales
    for layer in (scales.expand, *scales.scales, scales.reduce):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.25)
    gate = decoder.attention.gate
    for layer in (gate.squeeze, gate.excite, gate.spatial, decoder.project, model.skip.conv1, model.heads[0]):
        bound = 1 / math.sqrt(layer.weight[0].numel())  # PyTorch's default is uniform
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.25)
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)):
            assert norm.eps == 1e-5
            assert (norm.weight == 1).all()
            assert not norm.bias.any()


# ------------------------------------------------------------------------------------------------ the parts


def test_reducing_unshuffled_channels_is_reducing_shuffled_ones():
    torch.manual_seed(0)
    block = M2B(6, (1, 3), "batch", dims=2, truncated=False)
    wide = torch.randn(2, 12, 5, 4)
    shuffled = torch.cat([wide[:, 0::2], wide[:, 1::2]], dim=1)  # all even channels, then all odd ones
    wanted = nn.functional.conv2d(shuffled, block.reduce.weight)
    torch.testing.assert_close(nn.functional.conv2d(wide, block._shuffled_weight()), wanted)


def test_a_position_embedding_at_home_is_the_same_tensor():
    position = torch.randn(1, 3, 4, 5, 6)
    assert resize_position(position, (4, 5, 6)) is position


def test_a_position_embedding_elsewhere_is_interpolated():
    ramp = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 2, 4, 3, 3)
    resized = resize_position(ramp, (8, 3, 5))
    assert resized.shape == (1, 2, 8, 3, 5)
    torch.testing.assert_close(resized[0, 0, :, 0, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))


def test_the_masked_mean_ignores_the_empty_tail():
    torch.manual_seed(0)
    gate = LCBAM(8, 0.0, dims=2, std=None)
    z = torch.randn(1, 8, 3, 4)
    z[:, :, 2, 2:] = 0  # ten voxels, two empty pixels
    wanted = (z.sum(dim=(2, 3), keepdim=True) / 10).view(1, 8)
    seen = []
    gate.squeeze.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].view(1, 8)))
    gate(z, filled=10 / 12)
    gate(z)
    torch.testing.assert_close(seen[0], wanted)
    torch.testing.assert_close(seen[1], wanted * 10 / 12)


def test_the_true_three_dimensional_variant_has_its_own_kernels():
    with torch.device("meta"):
        folded, cubic = (build_model("mlru++", preset="acdc", num_labels=4, fold=fold) for fold in ("2d", "3d"))
    blocks = [block for block in folded.modules() if isinstance(block, Block)]
    more = sum(588 + 2 * block.gamma.numel() * 118 for block in blocks)
    assert count_parameters(cubic) - count_parameters(folded) == more


def test_neighbours_in_the_body_stay_neighbours_without_the_fold():
    torch.manual_seed(0)
    attention = FoldedAttention(
        LCBAM(4, 0.0, dims=3, std=None), M2B(4, (1, 3), "instance", dims=3, truncated=False), masked=False
    ).eval()
    x = torch.randn(1, 5, 6, 7, 4)
    mirrored = attention(x.flip(2), True)
    for layer in (attention.gate.spatial, *attention.scales.scales):
        layer.weight.data = layer.weight.data.flip(3)
    torch.testing.assert_close(mirrored, attention(x, True).flip(3))


def test_an_input_of_another_size_gives_logits_of_its_own_size():
    model = small().eval()
    for size in ((4, 8, 24), (3, 9, 17), (1, 1, 1), (13, 8, 5)):
        assert model(torch.randn(1, 1, *size)).shape == (1, 3, *size)


def test_coarser_outputs_of_an_odd_input_cover_the_same_field_of_view():
    model = small().train()
    fine, middle, coarse = model(torch.randn(2, 1, 5, 11, 21))
    assert fine.shape[2:] == (5, 11, 21)
    assert middle.shape[2:] == (5, 6, 11)
    assert coarse.shape[2:] == (3, 3, 5)


# ------------------------------------------------------------------------------------------------ gradients


def directional(loss, tensor, direction, step):
    """Central difference of `loss` along `direction`."""
    start, values = tensor.detach().clone(), []
    for sign in (1, -1):
        with torch.no_grad():
            tensor.copy_(start + sign * step * direction)
            values.append(loss().item())
    with torch.no_grad():
        tensor.copy_(start)
    return (values[0] - values[1]) / (2 * step)


def check_by_differences(module, inputs, run):
    """Compare autograd with differences along a random direction of the input and of each parameter by itself."""
    generator = torch.Generator().manual_seed(5)
    probe = None

    def loss():
        nonlocal probe
        outputs = run(inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if probe is None:
            probe = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
        return sum((y * p).sum() for y, p in zip(outputs, probe, strict=True))

    names, tensors = zip(("input", inputs), *module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss(), tensors)
    directions = [  # as large as the tensor itself, so that few rectifiers switch within a step
        torch.randn(t.shape, generator=generator, dtype=t.dtype) * t.detach().square().mean().sqrt().clamp(min=1e-3)
        for t in tensors
    ]
    scale = max((g * d).sum().abs().item() for g, d in zip(gradients, directions, strict=True))
    for name, tensor, gradient, direction in zip(names, tensors, gradients, directions, strict=True):
        found = (gradient * direction).sum().item()
        wanted = directional(loss, tensor, direction, 1e-7)
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5 * scale), name


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("grid", [(2, 5, 5), (4, 4, 4)], ids=["padded", "unpadded"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
def test_gradients_of_a_block_agree_with_differences(kind, layout, grid, batch):
    torch.manual_seed(0)
    attention = FoldedAttention(
        LCBAM(8, 0.0, dims=2, std=None), M2B(8, (1, 3, 5), kind, dims=2, truncated=False), masked=False
    )
    options = {"n_res": 2, "norm": kind, "conv_dropout": 0.0, "gamma_init": 0.5}
    block = Block(8, grid, attention=attention, **options).double().train()
    nn.init.normal_(block.position)
    for layer in (attention.scales.expand, *attention.scales.scales, attention.scales.reduce):
        nn.init.normal_(layer.weight, std=0.5)
    x = torch.randn(batch, *grid, 8, dtype=torch.float64).movedim(-1, 1)
    x = x.contiguous() if layout == "contiguous" else x
    check_by_differences(block, x.requires_grad_(), block)


@pytest.mark.parametrize(("fold", "layout"), [("2d", "channels_last"), ("3d", "contiguous")])
def test_gradients_of_the_whole_network_agree_with_differences(fold, layout):
    options = {"fold": fold, "memory_format": layout, "attn_dropout": 0.0, "conv_dropout": 0.0, "gamma_init": 0.5}
    model = small(base_width=2, depths=[1, 1], **options).double().train()
    x = torch.randn(2, 1, 3, 7, 13, dtype=torch.float64, requires_grad=True)  # padded, cropped, resized positions
    check_by_differences(model, x, model)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_single_precision_gradients_of_one_sample_are_those_of_double_precision(layout, norm):
    """The fast paths of a batch of one exist in single precision only."""
    options = {"memory_format": layout, "norm": norm, "attn_dropout": 0.0, "conv_dropout": 0.0, "gamma_init": 0.5}
    model = small(**options).train()
    x = torch.randn(1, 1, 4, 8, 24)

    def gradients(network, image):
        sum(logits.square().sum() for logits in network(image)).backward()
        return {name: parameter.grad.double() for name, parameter in network.named_parameters()}

    single = gradients(model, x)
    model.zero_grad()
    double = gradients(model.double(), x.double())
    for name, gradient in single.items():
        distance = (gradient - double[name]).norm() / (double[name].norm() + 1e-6 * len(double[name]))
        assert distance < 1e-2, name


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_both_layouts_train_alike(norm):
    last, first = (
        small(norm=norm, memory_format=layout, attn_dropout=0.0, conv_dropout=0.0).double().train()
        for layout in ("channels_last", "contiguous")
    )
    x = torch.randn(1, 1, 5, 9, 13, dtype=torch.float64)
    for model in (last, first):
        sum(logits.square().sum() for logits in model(x)).backward()
    for ours, theirs in zip(last.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(last.buffers(), first.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients_and_statistics(dropout):
    kept, recomputed = (
        small(checkpoint_activations=on, attn_dropout=dropout, conv_dropout=dropout).double().train()
        for on in (False, True)
    )
    x = torch.randn(2, 1, 4, 8, 24, dtype=torch.float64)
    for model in (kept, recomputed):
        torch.manual_seed(4)
        sum(logits.square().sum() for logits in model(x)).backward()
    for (name, ours), theirs in zip(recomputed.named_parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for (name, ours), theirs in zip(recomputed.named_buffers(), kept.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_layer_scale_and_gates_survive_reduced_precision():
    model = small(attn_dropout=0.0, conv_dropout=0.0, gamma_init=1e-6).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(logits.float().square().mean() for logits in model(torch.randn(2, 1, 4, 8, 24)))
    loss.backward()
    gammas = [parameter for name, parameter in model.named_parameters() if name.endswith("gamma")]
    assert all(gamma.dtype == torch.float32 and gamma.grad.abs().sum() > 0 for gamma in gammas)
