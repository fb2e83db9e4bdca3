"""Bi-WKV at the edges: what is empty, endless, not a number, or leaves as a file."""

import pytest
import torch
from torch import nn

from fedseg.layers.kernels import IMPLEMENTATIONS, bi_wkv, native
from fedseg.layers.kernels.exported import bi_wkv_plain

needs_compiler = pytest.mark.skipif(native.unavailable() is not None, reason=f"no C++ here: {native.unavailable()}")
compiled = pytest.mark.parametrize("name", ["torch", pytest.param("cpp", marks=needs_compiler)])


def inputs(batch, tokens, channels, *, decay=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v, gy = (torch.randn(batch, tokens, channels, generator=generator) for _ in range(3))
    w, u = (torch.randn(channels, generator=generator) for _ in range(2))
    return k, v, decay * w, u, gy


def gradients(call, k, v, decay, first, gy):
    leaves = [x.clone().requires_grad_() for x in (k, v, decay, first)]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy)]


@compiled
def test_an_empty_batch_gives_an_empty_result_and_no_gradient(name):
    k, v, decay, first, gy = inputs(0, 5, 3)
    y, gk, gv, gdecay, gfirst = gradients(IMPLEMENTATIONS[name].call, k, v, decay, first, gy)
    assert y.shape == gk.shape == gv.shape == (0, 5, 3)
    assert not gdecay.any()
    assert not gfirst.any()


@compiled
@pytest.mark.parametrize(("token", "channel"), [(0, 0), (17, 34), (40, 2)])
def test_a_key_that_is_not_a_number_shows_in_its_channel_and_in_no_other(name, token, channel):
    k, v, decay, first, _ = inputs(2, 41, 35)
    k[1, token, channel] = float("nan")
    y = IMPLEMENTATIONS[name].call(k, v, decay, first)
    wanted = torch.zeros(2, 41, 35, dtype=torch.bool)
    wanted[1, :, channel] = True
    assert torch.equal(y.isnan(), wanted)


@compiled
def test_tokens_with_a_key_of_minus_infinity_do_not_count(name):
    k, v, decay, _, _ = inputs(1, 90, 33)
    k[:, 60:] = -float("inf")
    short = IMPLEMENTATIONS[name].call(k[:, :60], v[:, :60], decay * 60 / 90, torch.zeros(33))
    y = IMPLEMENTATIONS[name].call(k, v, decay, torch.zeros(33))
    torch.testing.assert_close(y[:, :60], short, rtol=1e-5, atol=1e-6)
    assert y.isfinite().all()


@compiled
@pytest.mark.parametrize("tokens", [4096, 65536])
def test_accuracy_does_not_fall_with_the_number_of_tokens(name, tokens):
    given = inputs(1, tokens, 3)
    exact = gradients(IMPLEMENTATIONS["torch"].call, *(x.double() for x in given))
    for ours, theirs in zip(gradients(IMPLEMENTATIONS[name].call, *given), exact, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@compiled
def test_only_the_gradients_that_are_wanted_are_needed(name):
    k, v, decay, first, gy = inputs(2, 9, 4)
    wanted = gradients(IMPLEMENTATIONS[name].call, k, v, decay, first, gy)
    value = v.clone().requires_grad_()
    y = IMPLEMENTATIONS[name].call(k, value, decay, first)
    assert torch.equal(torch.autograd.grad(y, value, gy)[0], wanted[2])


@compiled
def test_a_second_derivative_is_refused_rather_than_wrong(name):
    k, v, decay, first, _ = inputs(1, 6, 2)
    k.requires_grad_()
    (gk,) = torch.autograd.grad(IMPLEMENTATIONS[name].call(k, v, decay, first).sum(), k, create_graph=True)
    with pytest.raises(RuntimeError):
        gk.sum().backward()


@needs_compiler
def test_a_type_of_its_own_for_keys_and_for_values():
    k, v, decay, first, _ = inputs(2, 33, 40)
    exact = IMPLEMENTATIONS["cpp"].call(k, v.bfloat16().float(), decay, first)
    mixed = IMPLEMENTATIONS["cpp"].call(k, v.bfloat16(), decay, first)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), exact, rtol=1e-2, atol=1e-2)


class Mix(nn.Module):
    def forward(self, k, v, decay, first):
        return bi_wkv(k, v, decay, first)


def test_an_exported_graph_holds_no_operator_of_ours_and_gives_the_same(tmp_path):
    k, v, decay, first, _ = inputs(2, 50, 6)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Mix(), (k, v, decay, first), dynamic_shapes=({0: batch}, {0: batch}, None, None))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called
    assert not [name for name in called if "fedseg" in name]
    torch.export.save(program, tmp_path / "mix.pt2")
    loaded = torch.export.load(tmp_path / "mix.pt2").module()
    k, v, _, _, _ = inputs(3, 50, 6, seed=1)
    torch.testing.assert_close(loaded(k, v, decay, first), bi_wkv(k, v, decay, first), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", [-59.0, -20.0, 20.0, 59.0])
def test_what_is_exported_is_right_for_large_decays_too(decay):
    k, v, _, first, _ = inputs(1, 800, 4)
    k = 5 * k
    decays = torch.full((4,), decay)
    exact = IMPLEMENTATIONS["reference"].call(k.double(), v.double(), decays.double(), first.double())
    assert (bi_wkv_plain(k, v, decays, first) - exact).abs().max() <= 1e-5 * exact.abs().max()
