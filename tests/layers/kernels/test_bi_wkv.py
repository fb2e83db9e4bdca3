"""Bi-WKV: every implementation against the definition in float64, and the choice between them."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.errors import ModelError
from fedseg.layers.kernels import IMPLEMENTATIONS, bi_wkv, choice, chosen, native, use_implementation
from fedseg.layers.kernels.exported import bi_wkv_plain
from fedseg.layers.kernels.reference import bi_wkv_reference

CALLS = {"torch": IMPLEMENTATIONS["torch"].call, "plain": bi_wkv_plain, "cpp": IMPLEMENTATIONS["cpp"].call}
needs_compiler = pytest.mark.skipif(native.unavailable() is not None, reason=f"no C++ here: {native.unavailable()}")
every = pytest.mark.parametrize("name", ["torch", "plain", pytest.param("cpp", marks=needs_compiler)])
compiled = pytest.mark.parametrize("name", ["torch", pytest.param("cpp", marks=needs_compiler)])


def inputs(batch, tokens, channels, *, decay=2.0, keys=2.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    k, v, gy = (torch.randn(batch, tokens, channels, generator=generator) for _ in range(3))
    w, u = (torch.randn(channels, generator=generator) for _ in range(2))
    return [(keys * k).to(dtype), v.to(dtype), decay * w, u, gy.to(dtype)]


def value_and_gradients(call, k, v, decay, first, gy):
    leaves = [x.detach().clone().requires_grad_() for x in (k, v, decay, first)]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy.to(y.dtype))]


def by_definition(k, v, decay, first, gy):
    exact = [x.double() for x in (k, v, decay, first, gy)]
    return value_and_gradients(bi_wkv_reference, *exact)


def check(call, given_inputs, tolerance=2e-5):
    """Values and their gradients relative to the largest, others to the largest of all: they are differences of such terms."""
    found, exact = value_and_gradients(call, *given_inputs), by_definition(*given_inputs)
    largest_gradient = max(float(x.abs().max()) for x in exact[1:])
    for index, (ours, theirs) in enumerate(zip(found, exact, strict=True)):
        assert ours.isfinite().all()
        scale = float(theirs.abs().max()) if index in (0, 2) else largest_gradient
        assert (ours.double() - theirs).abs().max() <= tolerance * scale + 1e-30


@every
@settings(deadline=None, max_examples=12)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 70),
    channels=st.integers(1, 70),
    decay=st.sampled_from([0.0, 1.0, 5.0, 25.0]),
    keys=st.sampled_from([0.1, 3.0, 10.0]),
    seed=st.integers(0, 9),
)
def test_values_and_gradients_are_those_of_the_definition(name, batch, tokens, channels, decay, keys, seed):
    k, v, w, u, gy = inputs(batch, tokens, channels, decay=decay, keys=keys, seed=seed)
    if name == "plain":  # made for trained networks: takes 60 for more
        w = w.clamp(-60, 60)
    check(CALLS[name], [k, v, w, u, gy])


@compiled
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [29.9, 60.0, 200.0])
def test_extreme_decays_are_exact(name, sign, size):
    k, v, decay, first, gy = inputs(1, 200, 40, keys=10.0)
    decay[:20] = sign * size  # beside ordinary ones
    check(CALLS[name], [k, v, decay, first, gy])


@compiled
def test_decays_beyond_300_act_like_300_and_have_no_gradient(name):
    k, v, _, first, gy = inputs(1, 50, 3)
    far, limit = torch.tensor([1e4, -1e4, 301.0]), torch.tensor([300.0, -300.0, 300.0])
    ours = value_and_gradients(CALLS[name], k, v, far, first, gy)
    theirs = value_and_gradients(CALLS[name], k, v, limit, first, gy)
    assert torch.equal(ours[0], theirs[0])
    assert not ours[3].any()
    assert theirs[3].isfinite().all()


@every
def test_huge_keys_and_long_sequences_do_not_overflow(name):
    check(CALLS[name], [*(x * s for x, s in zip(inputs(1, 300, 5), (5e3, 1, 1, 1, 1), strict=True))])
    k, v, decay, first, _ = inputs(1, 65536, 2)
    y = CALLS[name](k, v, decay, first)
    assert y.isfinite().all()
    assert v.amin() <= y.amin()
    assert y.amax() <= v.amax()


@every
def test_at_rest_every_token_gets_the_same_weighted_mean(name):
    k, v, *_ = inputs(2, 30, 4)
    y = CALLS[name](k, v, torch.zeros(4), torch.zeros(4))
    mean = (k.softmax(dim=1) * v).sum(dim=1, keepdim=True)
    torch.testing.assert_close(y, mean.expand_as(y), rtol=1e-5, atol=1e-6)


@every
def test_strides_do_not_matter(name):
    k, v, decay, first, gy = inputs(3, 21, 36)
    wanted = value_and_gradients(CALLS[name], k, v, decay, first, gy)
    turned = [k.mT.contiguous().mT, v.transpose(0, 1).contiguous().transpose(0, 1)]
    spread = torch.zeros(3, 21, 72)[..., ::2]
    spread.copy_(gy)
    leaves = [x.requires_grad_() for x in (*turned, decay.clone(), first.clone())]
    y = CALLS[name](*leaves)
    for ours, theirs in zip([y.detach(), *torch.autograd.grad(y, leaves, spread)], wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    leaves[0].grad = None
    CALLS[name](*leaves).sum().backward()  # an expanded gradient
    assert leaves[0].grad.isfinite().all()


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_is_summed_in_full(name, dtype, tolerance):
    given_inputs = inputs(2, 150, 12, dtype=dtype)
    found = value_and_gradients(CALLS[name], *given_inputs)
    assert [x.dtype for x in found] == [dtype] * 3 + [torch.float32] * 2
    check(CALLS[name], given_inputs, tolerance)


@every
def test_gradients_pass_gradcheck(name):
    k, v, decay, first, _ = (x.double() for x in inputs(2, 7, 35))
    k, v = k[..., :3], v[..., :3]
    leaves = [x.contiguous().requires_grad_() for x in (k, v, decay[:3], first[:3])]
    assert torch.autograd.gradcheck(CALLS[name], leaves)


@compiled
def test_an_operator_passes_pytorchs_own_checks(name):
    k, v, decay, first, _ = inputs(2, 6, 5)
    leaves = [x.requires_grad_() for x in (k, v, decay, first)]
    torch.library.opcheck(getattr(torch.ops.fedseg, f"bi_wkv_{name}").default, leaves)


@compiled
def test_it_can_be_compiled_and_autocast(name):
    torch.compiler.reset()
    k, v, decay, first, gy = inputs(2, 12, 8)
    with use_implementation(name):
        fast = torch.compile(bi_wkv, backend="aot_eager", fullgraph=True)
        for ours, theirs in zip(
            value_and_gradients(fast, k, v, decay, first, gy),
            value_and_gradients(bi_wkv, k, v, decay, first, gy),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
        with torch.autocast("cpu", torch.bfloat16):
            y = bi_wkv(k.bfloat16(), v.bfloat16(), decay, first)
    assert y.dtype == torch.bfloat16


@compiled
def test_the_number_of_threads_changes_no_bit(name):
    given_inputs = inputs(3, 90, 100)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(value_and_gradients(CALLS[name], *given_inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for other in found[1:] for one, other in zip(found[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("channels", [8, 31, 32, 33, 64, 100])
def test_float64_is_exact_for_any_number_of_channels(channels):
    given_inputs = [x.double() for x in inputs(2, 33, channels)]
    check(CALLS["cpp"], given_inputs, 1e-12)


def test_shapes_that_do_not_fit_are_refused():
    k, v, decay, first, _ = inputs(2, 5, 3)
    with pytest.raises(ModelError, match=r"one shape \(B, T, C\)"):
        bi_wkv(k, v[:, :4], decay, first)
    with pytest.raises(ModelError, match="a decay and a bonus for each of 3 channels"):
        bi_wkv(k, v, decay[:2], first)
    with pytest.raises(ModelError, match="floating point"):
        bi_wkv(k.long(), v, decay, first)


def test_an_implementation_can_be_chosen(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "reference")
    assert chosen("cpu") == "reference"
    with use_implementation("torch"):
        assert chosen("cpu") == "torch"
    k, v, decay, first, _ = inputs(1, 4, 2)
    assert torch.equal(bi_wkv(k, v, decay, first), bi_wkv_reference(k, v, decay, first))
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(ModelError, match=r"FEDSEG_BI_WKV: there is no implementation 'fast'.*auto, cpp, triton, torch"):
        chosen("cpu")
    with (
        pytest.raises(ModelError, match="use_implementation: there is no implementation 'cuda'"),
        use_implementation("cuda"),
    ):
        pass


USE = """
import torch, warnings
from fedseg.layers.kernels import bi_wkv, chosen
k = torch.ones(1, 3, 2)
for _ in range(2):
    bi_wkv(k, k, torch.zeros(2), torch.zeros(2))
print(chosen("cpu"))
"""


def run(program=USE, **environment):
    keep = {key: value for key, value in os.environ.items() if key not in (choice.VARIABLE, "CXX")}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**keep, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_without_a_compiler_it_works_and_says_once_that_it_is_slower(tmp_path):
    program = f"""
import os, sys
from fedseg.errors import ModelError
{USE}
del os.environ["FEDSEG_BI_WKV"]
print("unset", file=sys.stderr)
{USE}
os.environ["FEDSEG_BI_WKV"] = "cpp"
try:
    chosen("cpu")
except ModelError as error:
    print(error)
"""
    done = run(program, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), FEDSEG_BI_WKV="torch")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    first, second, refusal = out.splitlines()
    assert first == second == "torch"
    assert "FEDSEG_BI_WKV: cpp cannot run here: no C++ compiler" in refusal
    quiet, _, warned = err.partition("unset\n")
    assert quiet == ""
    assert warned.count("several times slower") == 1
    assert "no C++ compiler" in warned


def test_a_compiler_that_fails_is_no_reason_to_stop(tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    done = run(CXX=str(broken), XDG_CACHE_HOME=str(tmp_path))
    out, err = done.communicate(timeout=120)
    assert (done.returncode, out.strip()) == (0, "torch"), err
    assert "could not compile bi_wkv.cpp: out of order" in err


@needs_compiler
def test_processes_compile_at_once_and_the_next_one_not_at_all(tmp_path):
    both = [run(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    for one in both:
        out, err = one.communicate(timeout=240)
        assert (one.returncode, out.strip()) == (0, "cpp"), err
    folder = tmp_path / "fedseg" / "kernels"
    assert folder.stat().st_mode & 0o777 == 0o700
    (build,) = folder.iterdir()
    made = build.stat().st_mtime_ns
    out, err = run(XDG_CACHE_HOME=str(tmp_path), PATH="").communicate(timeout=120)
    assert out.strip() == "cpp", err
    assert build.stat().st_mtime_ns == made


def test_nothing_is_compiled_when_the_package_is_imported(tmp_path):
    done = run("import fedseg.layers.kernels", XDG_CACHE_HOME=str(tmp_path))
    assert done.communicate(timeout=120)[1] == ""
    assert done.returncode == 0
    assert not list(Path(tmp_path).rglob("*.so"))


def test_the_warning_does_not_come_where_there_is_the_fast_one():
    if native.unavailable() is not None:
        pytest.skip(f"no C++ here: {native.unavailable()}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice._automatic.pop("cpu", None)
        assert chosen("cpu") == "cpp"
