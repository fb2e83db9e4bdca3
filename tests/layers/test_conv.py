import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedseg.layers.conv import Conv3d, Pointwise, SafeConv3d, in_channels_last, is_channels_last, like, make_safe

sizes = st.tuples(*[st.integers(1, 7)] * 3)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def volume(batch, channels, size, layout="contiguous", **options):
    x = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0), **options)
    return in_channels_last(x) if layout == "channels_last" else x


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(1, 3), st.integers(1, 2), st.sampled_from(["contiguous", "channels_last"]))
def test_convolving_in_halves_is_convolving(size, channels, batch, layout):
    torch.manual_seed(0)
    layer, x = Conv3d(channels, 4), volume(batch, channels, size, layout)
    ones = torch.ones(batch, 4, *size)
    x.requires_grad_()
    found = torch.autograd.grad(layer(x), (x, layer.weight), ones)
    wanted = torch.autograd.grad(
        F.conv3d(x.double(), layer.weight.double(), padding=1), (x, layer.weight), ones.double()
    )
    torch.testing.assert_close(layer(x), F.conv3d(x, layer.weight, padding=1), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@layouts
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("batch", [1, 2])
def test_convolutions_keep_the_layout(layout, channels, batch):
    x = volume(batch, channels, (3, 4, 5), layout)
    for layer in (Conv3d(channels, 4), Pointwise(channels, 4)):
        y = layer(x)
        assert is_channels_last(y) == (layout == "channels_last")
        assert y.stride(0) == y[0].numel()


def test_channels_last_is_dense_in_every_stride():
    for batch, channels in ((1, 1), (1, 4), (2, 1), (2, 4)):
        x = volume(batch, channels, (2, 3, 4))
        y = in_channels_last(x)
        assert torch.equal(x, y)
        assert y.stride() == (24 * channels, 1, 12 * channels, 4 * channels, channels)


def test_a_tensor_in_the_right_layout_is_not_copied():
    for x in (volume(2, 3, (2, 3, 4)), volume(2, 3, (2, 3, 4), "channels_last")):
        assert like(x, x) is x


@layouts
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_layer_is_a_convolution(layout, dims, bias):
    layer = Pointwise(3, 5, dims=dims, bias=bias)
    x = volume(2, 3, (4, 5, 6)[:dims], layout)
    convolve = F.conv2d if dims == 2 else F.conv3d
    torch.testing.assert_close(layer(x), convolve(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)


def spoil_memory(layer):
    """Leave NaN in memory that the next allocations are likely to get."""
    for count in (1000, layer.weight.numel(), 10_000, 100_000):
        torch.full((count,), torch.nan)
        torch.full((count,), torch.nan, dtype=torch.bfloat16)


@layouts
@pytest.mark.parametrize(
    ("kernel", "depth", "groups"), [(3, 1, 1), (3, 2, 1), (3, 3, 1), (3, 2, 16), (5, 3, 16), (5, 4, 16), (7, 4, 1)]
)
def test_bfloat16_gradients_of_thin_volumes_are_right(layout, kernel, depth, groups):
    torch.manual_seed(0)
    layer = SafeConv3d(16, 16, kernel, padding=kernel // 2, groups=groups)
    x = volume(2, 16, (depth, 6, 5), layout)
    for _ in range(5):
        spoil_memory(layer)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        spoil_memory(layer)
        found = torch.autograd.grad(y.float().square().sum(), layer.weight)[0]
        wanted = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_a_network_in_bfloat16_stays_in_bfloat16():
    layer = SafeConv3d(2, 4, 3, padding=1).bfloat16()
    assert layer(volume(1, 2, (2, 4, 4), dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_making_a_network_safe_changes_its_convolutions_only():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), Conv3d(4, 4), nn.Conv2d(1, 1, 1))
    before = network.state_dict()
    x = volume(1, 2, (4, 4, 4))
    wanted = network[:3](x)
    safe = make_safe(network)
    assert [type(module) for module in safe] == [SafeConv3d, nn.ReLU, Conv3d, nn.Conv2d]
    assert safe.state_dict().keys() == before.keys()
    assert torch.equal(safe[:3](x), wanted)
