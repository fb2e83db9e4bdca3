"""RWKV's layers against plain index assignment and against the table of weights that defines Bi-WKV."""

import itertools

import pytest
import torch

from fedseg.layers.drop_path import DropPath
from fedseg.layers.rwkv import ChannelMix, SpatialMix, raster_orders, shift
from tests.models.rwkv_by_the_book import bi_wkv, q_shift

GRIDS = {2: (5, 7), 3: (3, 4, 5)}
TURNS = [(2, order) for order in itertools.permutations(range(2))]
TURNS += [(3, order) for order in itertools.permutations(range(3))]
every_turn = pytest.mark.parametrize(("dims", "order"), TURNS)
every_grid = pytest.mark.parametrize("dims", [2, 3])


def features(dims, channels, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *GRIDS[dims], channels, generator=generator, dtype=torch.float64)


def randomised(layer):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in layer.double().parameters():
            scale = tensor.shape[-1] ** -0.5 if tensor.dim() == 2 else 1.0
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return layer


def shifted_by_hand(x):
    """Six sixths of the channels of `(B, D, H, W, C)`: left, right, above, below, front, behind; the rest stays."""
    g, y = x.shape[-1] // 6, torch.zeros_like(x)
    y[:, :, :, 1:, 0 * g : 1 * g] = x[:, :, :, :-1, 0 * g : 1 * g]
    y[:, :, :, :-1, 1 * g : 2 * g] = x[:, :, :, 1:, 1 * g : 2 * g]
    y[:, :, 1:, :, 2 * g : 3 * g] = x[:, :, :-1, :, 2 * g : 3 * g]
    y[:, :, :-1, :, 3 * g : 4 * g] = x[:, :, 1:, :, 3 * g : 4 * g]
    y[:, 1:, :, :, 4 * g : 5 * g] = x[:, :-1, :, :, 4 * g : 5 * g]
    y[:, :-1, :, :, 5 * g : 6 * g] = x[:, 1:, :, :, 5 * g : 6 * g]
    y[..., 6 * g :] = x[..., 6 * g :]
    return y


@pytest.mark.parametrize("channels", [3, 4, 8, 11])
def test_the_shift_of_images_is_index_assignment(channels):
    x = features(2, channels)
    assert torch.equal(shift(x), q_shift(x.movedim(-1, 1)).movedim(1, -1))


@pytest.mark.parametrize("channels", [5, 6, 12, 17])
def test_the_shift_of_volumes_is_index_assignment(channels):
    x = features(3, channels)
    assert torch.equal(shift(x), shifted_by_hand(x))


@every_grid
def test_an_impulse_moves_to_one_neighbour_for_each_direction(dims):
    x = torch.zeros(1, *[3] * dims, 2 * dims)
    centre = (1,) * dims
    x[0, *centre] = 1
    moved = shift(x)
    found = [tuple(moved[0, ..., channel].nonzero().squeeze(0).tolist()) for channel in range(2 * dims)]
    wanted = []
    for axis in reversed(range(dims)):  # columns, rows, slices
        for step in (1, -1):
            wanted.append(tuple(1 + step * (at == axis) for at in range(dims)))
    assert found == wanted
    assert moved.sum() == 2 * dims


@every_grid
def test_nothing_enters_from_beyond_the_border(dims):
    x = torch.ones(1, *[1] * dims, 2 * dims + 1)
    assert shift(x)[0].flatten().tolist() == [0] * (2 * dims) + [1]


@every_turn
def test_tokens_find_back_to_their_places(dims, order):
    layer, x = SpatialMix(6, order), features(dims, 6)
    tokens = layer._tokens(x)
    assert tokens.shape == (2, x[0, ..., 0].numel(), 6)
    assert torch.equal(layer._from_tokens(tokens, x.shape), x)


@every_turn
def test_tokens_walk_along_the_order_s_last_axis_first(dims, order):
    places = torch.cartesian_prod(*(torch.arange(length) for length in GRIDS[dims])).view(1, *GRIDS[dims], dims)
    tokens = SpatialMix(dims, order)._tokens(places)[0, :, list(order)]
    assert tokens.tolist() == sorted(tokens.tolist())


def test_each_raster_order_walks_along_another_axis():
    assert raster_orders(2) == [(0, 1), (1, 0)]
    assert raster_orders(3) == [(0, 1, 2), (1, 2, 0), (2, 0, 1)]


def walk(x, order):
    """Tokens `(B, T, C)` in the order in which nested loops over the axes, outermost first, come to them."""
    places = itertools.product(*(range(x.shape[1 + axis]) for axis in order))
    return torch.stack([x[:, *(place[order.index(axis)] for axis in range(len(order)))] for place in places], dim=1)


@every_turn
def test_a_spatial_mix_is_its_equations_in_any_order(dims, order):
    layer, x = randomised(SpatialMix(12, order)), features(dims, 12)
    with torch.no_grad():
        layer.decay.mul_(4)
        before = q_shift(x.movedim(-1, 1)).movedim(1, -1) if dims == 2 else shifted_by_hand(x)
        mixes = {"key": layer.mix_key, "value": layer.mix_value, "receptance": layer.mix_receptance}
        key, value, receptance = (
            walk((x * mix + before * (1 - mix)) @ getattr(layer, name).weight.T, order) for name, mix in mixes.items()
        )
        count = key.shape[1]
        wkv = bi_wkv(layer.decay / count, layer.first / count, key, value)
        wanted = (torch.sigmoid(receptance) * layer.norm(wkv)) @ layer.output.weight.T
        torch.testing.assert_close(walk(layer(x), order), wanted, rtol=1e-10, atol=1e-10)


@every_grid
def test_a_channel_mix_is_its_equations(dims):
    layer, x = randomised(ChannelMix(12)), features(dims, 12)
    with torch.no_grad():
        before = q_shift(x.movedim(-1, 1)).movedim(1, -1) if dims == 2 else shifted_by_hand(x)
        key = (x * layer.mix_key + before * (1 - layer.mix_key)) @ layer.key.weight.T
        gate = (x * layer.mix_receptance + before * (1 - layer.mix_receptance)) @ layer.receptance.weight.T
        hidden = layer.norm(key.clamp(min=0) ** 2)
        wanted = (hidden @ layer.value.weight.T) / (1 + torch.exp(-gate))
        torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


@every_grid
def test_one_voxel_reaches_all_through_a_spatial_mix(dims):
    layer, x = randomised(SpatialMix(12, range(dims))), features(dims, 12, batch=1).requires_grad_()
    layer(x)[0, *[0] * dims].sum().backward()
    assert (x.grad.abs().amax(-1) > 0).all()


def test_samples_do_not_mix():
    layer, x = randomised(SpatialMix(12)), features(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[1:], layer(x[1:]), rtol=1e-12, atol=1e-12)


def test_a_dropped_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    samples, rate = 20_000, 0.3
    x = torch.rand(samples, 2, 3) + 0.5
    factors = (DropPath(rate).train()(x) / x).flatten(1)
    assert torch.allclose(factors, factors[:, :1].expand_as(factors))
    kept = factors[:, 0] > 0
    torch.testing.assert_close(factors[kept, 0], torch.full((int(kept.sum()),), 1 / (1 - rate)))
    assert (factors[~kept] == 0).all()
    error = (rate * (1 - rate) / samples) ** 0.5
    assert abs(kept.double().mean().item() - (1 - rate)) < 4 * error


@pytest.mark.parametrize(("rate", "training"), [(0.0, True), (0.5, False)])
def test_a_path_is_left_alone_in_evaluation_and_without_a_rate(rate, training):
    x = features(2, 4)
    assert torch.equal(DropPath(rate).train(training)(x), x)


def test_a_dropped_path_passes_no_gradient():
    torch.manual_seed(0)
    x = features(2, 4, batch=64).requires_grad_()
    y = DropPath(0.5).train()(x)
    y.sum().backward()
    dropped = (y == 0).flatten(1).all(1)
    assert 0 < dropped.sum() < 64
    assert not x.grad[dropped].any()
    assert (x.grad[~dropped] == 2).all()
