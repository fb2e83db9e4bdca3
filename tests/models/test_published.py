"""Released names and the released layout, written anew from the paper's description: tokens `(B, N, C)` throughout."""

import math

import pytest
import torch
from torch.nn import functional as F

from fedseg.errors import ModelError
from fedseg.models import build_model, load_published
from fedseg.models.published import published_names

WIDTHS, LEVELS = (4, 8, 16, 32), 4
SIZE, STEM = (8, 16, 48), (1, 2, 2)
GRIDS = [(8, 8, 24), (4, 4, 12), (2, 2, 6), (1, 1, 3)]  # folds with and without an empty tail


def build(**options):
    chosen = {"base_width": 2, "depths": [2, 1, 1, 1], "decoder_depth": 1, "stem": list(STEM), **options}
    torch.manual_seed(1)
    return build_model(
        "mlru++", preset="acdc", in_channels=2, num_labels=3, patch_size=chosen.pop("patch_size", SIZE), **chosen
    )


def released_state(n_res=2):
    """Random tensors under the released names, shapes from the released sizes."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def tensor(name, *shape, scale=0.5):
        state[name] = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def norm(name, channels, running=True):
        for part in ["weight", "bias", *(["running_mean"] if running else [])]:
            tensor(f"{name}.{part}", channels)
        if running:
            state[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=generator, dtype=torch.float64)
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def block(prefix, c, tokens):
        r = max(4, c // 16)
        tensor(f"{prefix}.gamma", c)
        tensor(f"{prefix}.pos_embed", 1, tokens, c)
        norm(f"{prefix}.norm", c, running=False)
        tensor(f"{prefix}.epa_block.epa.fc1.weight", r, c, 1, 1)
        tensor(f"{prefix}.epa_block.epa.fc2.weight", c, r, 1, 1)
        tensor(f"{prefix}.epa_block.epa.sa_conv.weight", 1, 2, 7, 7, scale=0.1)
        tensor(f"{prefix}.epa_block.mscb.pconv1.0.weight", 2 * c, c, 1, 1)
        norm(f"{prefix}.epa_block.mscb.pconv1.1", 2 * c)
        for i, k in enumerate((1, 3, 5)):
            tensor(f"{prefix}.epa_block.mscb.msdc.dwconvs.{i}.0.weight", 2 * c, 1, k, k)
            norm(f"{prefix}.epa_block.mscb.msdc.dwconvs.{i}.1", 2 * c)
        tensor(f"{prefix}.epa_block.mscb.pconv2.0.weight", c, 2 * c, 1, 1)
        norm(f"{prefix}.epa_block.mscb.pconv2.1", c)
        for res in ("conv51", "conv52")[:n_res]:
            for half in (1, 2):
                tensor(f"{prefix}.{res}.conv{half}.conv.weight", c, c, 3, 3, 3, scale=0.2)
                norm(f"{prefix}.{res}.norm{half}", c)
        tensor(f"{prefix}.conv8.1.weight", c, c, 1, 1, 1)
        tensor(f"{prefix}.conv8.1.bias", c)

    inputs = (2, *WIDTHS)
    for level, width in enumerate(WIDTHS):
        kernel = (2, 2, 2) if level else STEM
        tensor(f"unetr_pp_encoder.downsample_layers.{level}.0.conv.weight", width, inputs[level], *kernel)
        norm(f"unetr_pp_encoder.downsample_layers.{level}.1", width, running=False)
        for index in range((2, 1, 1, 1)[level]):
            block(f"unetr_pp_encoder.stages.{level}.{index}", width, math.prod(GRIDS[level]))
    tensor("encoder1.conv1.conv.weight", 2, 2, 3, 3, 3)
    tensor("encoder1.conv2.conv.weight", 2, 2, 3, 3, 3)
    for name, coarse, fine, level in (("decoder5", 32, 16, 2), ("decoder4", 16, 8, 1), ("decoder3", 8, 4, 0)):
        tensor(f"{name}.transp_conv.conv.weight", coarse, fine, 2, 2, 2)
        block(f"{name}.decoder_block.0.0", fine, math.prod(GRIDS[level]))
    tensor("decoder2.transp_conv.conv.weight", 4, 2, *STEM)
    tensor("decoder2.decoder_block.0.conv1.conv.weight", 2, 2, 3, 3, 3)
    tensor("decoder2.decoder_block.0.conv2.conv.weight", 2, 2, 3, 3, 3)
    for head, width in enumerate((2, 4, 8), start=1):
        tensor(f"out{head}.conv.conv.weight", 3, width, 1, 1, 1)
        tensor(f"out{head}.conv.conv.bias", 3)
    return state


def released_forward(state, image, n_res=2):
    """The released network in training mode without dropout, as a function of its state dict."""

    def batch_norm(name, x):
        return F.batch_norm(x, None, None, state[f"{name}.weight"], state[f"{name}.bias"], training=True)

    def fold(t):
        n = t.shape[1]
        h = int(math.sqrt(n))
        w = math.ceil(n / h)
        t = torch.cat([t, t.new_zeros(t.shape[0], h * w - n, t.shape[2])], dim=1)
        return t.transpose(1, 2).reshape(t.shape[0], t.shape[2], h, w)

    def unfold(z, n):
        return z.flatten(2)[:, :, :n].transpose(1, 2)

    def gate(p, z):
        a = F.conv2d(z.mean((2, 3), keepdim=True), state[f"{p}.fc1.weight"])
        z = z * F.conv2d(a.relu(), state[f"{p}.fc2.weight"]).sigmoid()
        maps = torch.stack([z.mean(1), z.max(1).values], dim=1)
        return z * F.conv2d(maps, state[f"{p}.sa_conv.weight"], padding=3).sigmoid()

    def scales(p, z):
        e = F.relu6(batch_norm(f"{p}.pconv1.1", F.conv2d(z, state[f"{p}.pconv1.0.weight"])))
        s = 0
        for i, k in enumerate((1, 3, 5)):
            branch = F.conv2d(e, state[f"{p}.msdc.dwconvs.{i}.0.weight"], padding=(k - 1) // 2, groups=e.shape[1])
            s = s + F.relu6(batch_norm(f"{p}.msdc.dwconvs.{i}.1", branch))
        shuffled = torch.cat([s[:, 0::2], s[:, 1::2]], dim=1)
        return z + batch_norm(f"{p}.pconv2.1", F.conv2d(shuffled, state[f"{p}.pconv2.0.weight"]))

    def residual(x, first, second, norm1, norm2, shortcut=None):
        y = F.leaky_relu(norm1(F.conv3d(x, state[first], padding=1)), 0.01)
        y = norm2(F.conv3d(y, state[second], padding=1))
        return F.leaky_relu(y + (x if shortcut is None else shortcut), 0.01)

    def block(p, x):
        b, c, *grid = x.shape
        n = math.prod(grid)
        t = x.flatten(2).transpose(1, 2) + state[f"{p}.pos_embed"]
        normed = F.layer_norm(t, (c,), state[f"{p}.norm.weight"], state[f"{p}.norm.bias"], 1e-5)
        gated = unfold(gate(f"{p}.epa_block.epa", fold(normed)), n)
        t = t + state[f"{p}.gamma"] * unfold(scales(f"{p}.epa_block.mscb", fold(gated)), n)
        u = t.transpose(1, 2).reshape(b, c, *grid)
        v = u
        for res in ("conv51", "conv52")[:n_res]:
            v = residual(
                v,
                f"{p}.{res}.conv1.conv.weight",
                f"{p}.{res}.conv2.conv.weight",
                lambda y, res=res: batch_norm(f"{p}.{res}.norm1", y),
                lambda y, res=res: batch_norm(f"{p}.{res}.norm2", y),
            )
        return u + F.conv3d(v, state[f"{p}.conv8.1.weight"], state[f"{p}.conv8.1.bias"])

    def full(p, x):
        return residual(x, f"{p}.conv1.conv.weight", f"{p}.conv2.conv.weight", F.instance_norm, F.instance_norm)

    x, features = image, []
    for level in range(LEVELS):
        p = f"unetr_pp_encoder.downsample_layers.{level}"
        kernel = (2, 2, 2) if level else STEM
        x = F.conv3d(x, state[f"{p}.0.conv.weight"], stride=kernel)
        x = F.group_norm(x, (2, *WIDTHS)[level], state[f"{p}.1.weight"], state[f"{p}.1.bias"])
        for index in range((2, 1, 1, 1)[level]):
            x = block(f"unetr_pp_encoder.stages.{level}.{index}", x)
        features.append(x)
    decoded = []
    for name, level in (("decoder5", 2), ("decoder4", 1), ("decoder3", 0)):
        x = F.conv_transpose3d(x, state[f"{name}.transp_conv.conv.weight"], stride=2) + features[level]
        x = block(f"{name}.decoder_block.0.0", x)
        decoded.append(x)
    x = F.conv_transpose3d(x, state["decoder2.transp_conv.conv.weight"], stride=STEM) + full("encoder1", image)
    ends = [full("decoder2.decoder_block.0", x), decoded[2], decoded[1]]
    return [
        F.conv3d(end, state[f"out{i}.conv.conv.weight"], state[f"out{i}.conv.conv.bias"])
        for i, end in enumerate(ends, start=1)
    ]


@pytest.mark.parametrize("n_res", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_loaded_checkpoint_computes_what_the_released_network_computes(layout, n_res):
    state = released_state(n_res)
    model = build(n_res=n_res, memory_format=layout, attn_dropout=0.0, conv_dropout=0.0).double().train()
    load_published(model, state)
    image = torch.randn(2, 2, *SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found, wanted = model(image), released_forward(state, image, n_res)
    assert [tuple(logits.shape) for logits in found] == [(2, 3, *SIZE), (2, 3, *GRIDS[0]), (2, 3, *GRIDS[1])]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_every_released_tensor_ends_up_in_the_network():
    state, model = released_state(), build().double()
    load_published(model, state)
    loaded = model.state_dict()
    assert len(loaded) == len(state)
    assert sum(tensor.double().sum() for tensor in loaded.values()).item() == pytest.approx(
        sum(tensor.double().sum() for tensor in state.values()).item()
    )
    assert loaded["encoder.0.0.residual.0.norm1.num_batches_tracked"] == 7


def test_position_embeddings_are_in_raster_order():
    state, model = released_state(), build().double()
    load_published(model, state)
    d, h, w = 3, 5, 17
    ours = model.encoder[0][1].position[0, :, d, h, w]
    assert torch.equal(ours, state["unetr_pp_encoder.stages.0.1.pos_embed"][0, (d * 8 + h) * 24 + w])


def test_the_prefix_of_parallel_training_is_tolerated():
    state, plain, prefixed = released_state(), build(), build()
    load_published(plain, state)
    load_published(prefixed, {f"module.{name}": tensor for name, tensor in state.items()})
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, prefixed.state_dict()[name])


def test_counters_may_be_missing():
    model = build()
    load_published(model, {n: t for n, t in released_state().items() if not n.endswith("num_batches_tracked")})
    assert model.encoder[0][0].residual[0].norm1.num_batches_tracked == 0


def test_a_network_without_auxiliary_heads_leaves_theirs_unread():
    model = build(deep_supervision=False)
    load_published(model, released_state())
    assert len(model.heads) == 1


def drop(state):
    del state["unetr_pp_encoder.stages.1.0.epa_block.epa.fc1.weight"], state["out1.conv.conv.bias"]


def add(state):
    state["unetr_pp_encoder.stages.1.0.epa_block.epa.temperature"] = torch.ones(1)


def reshape(state):
    state["decoder4.decoder_block.0.0.pos_embed"] = torch.zeros(1, 191, 8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"missing: out1\.conv\.conv\.bias, unetr_pp_encoder\.stages\.1\.0\.epa_block\.epa\.fc1\.weight$"),
        (add, r"unknown: unetr_pp_encoder\.stages\.1\.0\.epa_block\.epa\.temperature$"),
        (reshape, r"of another shape: decoder4\.decoder_block\.0\.0\.pos_embed is \(1, 191, 8\), not \(1, 192, 8\)$"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(damage, message):
    state, model = released_state(), build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    damage(state)
    with pytest.raises(ModelError, match=message):
        load_published(model, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_all_faults_are_listed_at_once():
    state = released_state()
    for damage in (drop, add, reshape):
        damage(state)
    with pytest.raises(ModelError, match=r"nothing was loaded; missing: .*; unknown: .*; of another shape: "):
        load_published(build(), state)


def test_an_empty_checkpoint_gives_a_short_message():
    with pytest.raises(ModelError, match=r"and \d+ more") as caught:
        load_published(build(), {})
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "options", [{"norm": "instance"}, {"fold": "3d"}, {"pos_embed": "none"}, {"n_res": 1}, {"msd_kernels": [3, 5, 7]}]
)
def test_variants_that_were_never_released_are_refused(options):
    with pytest.raises(ModelError, match="does not fit this MLRUPlusPlus"):
        load_published(build(**options), released_state())


def test_a_network_without_a_released_counterpart_is_refused():
    with pytest.raises(ModelError, match="UNet has no released counterpart"):
        load_published(build_model("unet", num_labels=2), {})


@pytest.mark.parametrize(("preset", "tensors"), [("synapse", 1350), ("acdc", 1350), ("lung", 1350), ("tumor", 1098)])
def test_every_tensor_of_a_released_network_has_one_released_name(preset, tensors):
    with torch.device("meta"):
        model = build_model("mlru++", preset=preset, num_labels=4)
    names = published_names(model)
    assert names.keys() == model.state_dict().keys()
    assert len(set(names.values())) == len(names) == tensors
