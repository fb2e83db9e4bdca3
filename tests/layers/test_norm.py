import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedseg.layers.conv import in_channels_last
from fedseg.layers.norm import InstanceNorm, make_norm

LAYOUTS = {"contiguous": torch.Tensor.contiguous, "channels_last": in_channels_last}


def by_hand(x, layer):
    axes = tuple(range(2, x.dim()))
    y = (x - x.mean(axes, keepdim=True)) / (x.var(axes, unbiased=False, keepdim=True) + 1e-5).sqrt()
    if layer.weight is None:
        return y
    shape = (1, -1, *[1] * (x.dim() - 2))
    return y * layer.weight.view(shape) + layer.bias.view(shape)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(3, 4, 5), (6, 7)], ids=["volume", "image"])
def test_instance_norm_and_its_gradient_are_right_in_any_layout(size, layout, gradient, batch, affine):
    torch.manual_seed(0)
    layer = InstanceNorm(4, affine=affine).double()
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    x = LAYOUTS[layout](torch.randn(batch, 4, *size, dtype=torch.float64)).requires_grad_()
    g = LAYOUTS[gradient](torch.randn(batch, 4, *size, dtype=torch.float64))
    torch.testing.assert_close(layer(x), by_hand(x, layer))
    tensors = [x, *layer.parameters()]
    found = torch.autograd.grad(layer(x), tensors, g)
    for ours, theirs in zip(found, torch.autograd.grad(by_hand(x, layer), tensors, g), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_single_voxel_becomes_the_shift(layout):
    layer = InstanceNorm(4, affine=True)
    nn.init.normal_(layer.bias)
    y = layer(LAYOUTS[layout](torch.randn(2, 4, 1, 1, 1)))
    torch.testing.assert_close(y, layer.bias.view(1, 4, 1, 1, 1).expand(2, -1, -1, -1, -1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["batch", "instance", "group", None])
@pytest.mark.parametrize("channels", [1, 2, 4, 6, 10, 14, 32])
@pytest.mark.parametrize("dims", [2, 3])
def test_every_norm_takes_any_width(kind, channels, dims):
    x = torch.randn(2, channels, *(4, 5, 6)[:dims])
    y = make_norm(kind, channels, dims)(x)
    assert y.shape == x.shape
    assert y.mean().abs() < 0.1


def test_group_norm_has_groups_of_four_where_they_fit():
    assert make_norm("group", 32).num_groups == 8
    assert make_norm("group", 14).num_groups == 1


def test_full_resolution_norm_has_nothing_to_learn():
    layer = make_norm(None, 8)
    assert not layer.state_dict()
    x = torch.randn(2, 8, 3, 4, 5)
    torch.testing.assert_close(layer(x), F.instance_norm(x))
