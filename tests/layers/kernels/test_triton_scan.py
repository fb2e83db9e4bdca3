"""Bi-WKV in Triton, on a GPU where there is one, and always in Triton's interpreter.

The interpreter must be chosen before anything imports Triton, so it has a process of its own: one test here runs this file
again in there, and the tests that need kernels are skipped in the process without a GPU.
"""

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fedseg.errors import ModelError
from fedseg.layers.kernels import triton_scan
from fedseg.layers.kernels.triton_scan import bi_wkv_triton, unavailable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_kernels = pytest.mark.usefixtures("kernels")
outside = pytest.mark.skipif(INTERPRETED, reason="about the process without the interpreter")


@pytest.fixture
def kernels():
    if reason := unavailable():
        pytest.skip(f"{reason} (test_all_of_it_holds_in_the_interpreter runs these where Triton is installed)")


def defined(k_BTC, v_BTC, decay_C, first_C):
    """The definition, quadratic in tokens."""
    tokens = k_BTC.shape[1]
    place = torch.arange(tokens, device=k_BTC.device)
    distance_TTC = (place[:, None] - place).abs()[..., None]
    bias_TTC = torch.where(distance_TTC == 0, first_C, -decay_C * (distance_TTC - 1)) / tokens
    return (torch.softmax(k_BTC[:, None] + bias_TTC, dim=2) * v_BTC[:, None]).sum(2)


def inputs(batch, tokens, channels, *, keys=1.0, decay=5.0, first=5.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    k = keys * torch.randn(batch, tokens, channels, generator=draw)
    v = torch.randn(batch, tokens, channels, generator=draw)
    sizes = (decay * torch.randn(channels, generator=draw), first * torch.randn(channels, generator=draw))
    return [x.to(DEVICE) for x in (k, v, *sizes)]


def with_gradients(function, tensors, gy):
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy.to(y))]


def assert_close(tensors, *, relative, gy=None):
    """Output and gradients against the definition in float64; errors relative to the largest value of each."""
    gy = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) if gy is None else gy
    found = with_gradients(bi_wkv_triton, tensors, gy)
    expected = with_gradients(defined, [x.double() for x in tensors], gy.double())
    for name, ours, truth, like in zip(
        ("y", "k", "v", "decay", "first"), found, expected, (tensors[1], *tensors), strict=True
    ):
        assert ours.dtype == like.dtype
        assert ours.shape == like.shape
        error = (ours.double() - truth).abs().max().item() / max(truth.abs().max().item(), 0.1)
        assert error <= relative, f"{name}: {error:.1e}"


@pytest.fixture
def large_chunks(monkeypatch):
    """Chunks as long as moderate decays would allow: the interpreter takes its time for each."""
    monkeypatch.setattr(triton_scan, "_LARGEST_FADE", 300)


@pytest.fixture
def small_programs(large_chunks, monkeypatch):
    """And programs of few rows, where something else than the arithmetic is the matter."""
    monkeypatch.setattr(triton_scan, "_ROWS", 2)
    monkeypatch.setattr(triton_scan, "_GROUPS", 4)


@needs_kernels
@pytest.mark.parametrize(
    ("batch", "tokens", "channels"),
    [(2, 1, 5), (1, 2, 33), (1, 7, 3), (1, 130, 3)],
    ids=lambda n: str(n),
)
@pytest.mark.usefixtures("large_chunks")
def test_values_and_gradients_are_those_of_the_definition(batch, tokens, channels):
    assert_close(inputs(batch, tokens, channels), relative=1e-5)


@needs_kernels
@pytest.mark.parametrize("tokens", [3, 50])  # chunks of one token and of four, the last of them shorter
def test_extreme_decays_and_keys_neither_overflow_nor_lose_digits(tokens, monkeypatch):
    monkeypatch.setattr(triton_scan, "_ROWS", 2)  # more groups of fewer rows, which is less to interpret
    decays = torch.tensor([0.0, 5.0, -5.0, 30.0, 200.0, -200.0, 300.0, -300.0])
    spreads = torch.tensor([1.0, 10.0, 100.0, 10000.0])
    decay, spread = (x.flatten().to(DEVICE) for x in torch.meshgrid(decays, spreads, indexing="ij"))
    k, v, _, first = inputs(1, tokens, len(decay))
    gy = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = with_gradients(bi_wkv_triton, [k * spread, v, decay, first], gy)
    y, gk, gv, gdecay, gfirst = with_gradients(
        defined, [x.double() for x in (k * spread, v, decay, first)], gy.double()
    )
    # a gradient may be a small difference of large terms: errors count relative to those
    terms_C = gv.abs().amax((0, 1)) * v.abs().amax((0, 1))
    scales = (v.abs().amax((0, 1)), terms_C, gv.abs().amax((0, 1)), terms_C, terms_C)
    for ours, truth, scale_C in zip(found, (y, gk, gv, gdecay, gfirst), scales, strict=True):
        error_C = (ours.double() - truth).abs().view(-1, len(decay)).amax(0) / scale_C
        assert bool((error_C < 5e-6 + 3e-7 * decay.abs()).all()), error_C.view(len(decays), -1)


@needs_kernels
def test_chunks_as_shipped_are_small_enough_for_the_largest_decay():
    for tokens in range(1, 5000):
        length = triton_scan._length(tokens)
        assert length == 1 or length * 300 <= 25 * tokens
        assert math.log2(length).is_integer()


@needs_kernels
def test_decays_and_bonuses_beyond_the_bound_count_as_the_bound_and_have_no_gradient():
    k, v, _, _ = inputs(1, 5, 4)
    at, beyond, inside = (torch.tensor(x, device=DEVICE) for x in ([300.0, -300.0], [400.0, -1e6], [2.0, -3.0]))
    gy = torch.ones_like(v)
    expected = with_gradients(bi_wkv_triton, [k, v, torch.cat([at, inside]), torch.cat([inside, 5 * at])], gy)
    found = with_gradients(bi_wkv_triton, [k, v, torch.cat([beyond, inside]), torch.cat([inside, 5 * beyond])], gy)
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        assert bool(ours.isfinite().all())
        assert torch.equal(ours, theirs)
    assert found[3][:2].tolist() == found[4][2:].tolist() == [0.0, 0.0]
    assert bool((expected[3][:2] != 0).all())
    assert torch.equal(found[4][:2], expected[4][:2])


@needs_kernels
@pytest.mark.usefixtures("small_programs")
def test_rows_may_lie_anywhere_in_memory():
    k, v, decay, first = inputs(2, 12, 6)
    wide = torch.stack([v, k, torch.ones_like(k)], dim=2).flatten(2)  # (B, T, 3C): slices of one projection
    transposed = v.mT.contiguous().mT
    gy = torch.stack([k, v], dim=2).flatten(2)[..., 6:]
    expected = with_gradients(bi_wkv_triton, [k, v, decay, first], gy.contiguous())
    found = with_gradients(bi_wkv_triton, [wide[..., 6:12], transposed, decay, first], gy)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_kernels
@pytest.mark.usefixtures("small_programs")
def test_an_expanded_gradient_is_as_good_as_any():
    tensors = inputs(1, 5, 3)
    assert_close(tensors, relative=1e-5, gy=torch.ones(1, 1, 1, device=DEVICE).expand(1, 5, 3))
    leaves = [x.requires_grad_() for x in tensors]
    bi_wkv_triton(*leaves).sum().backward()
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_programs")
def test_half_precision_is_rounded_once(dtype):
    k, v, decay, first = inputs(1, 7, 3)
    tensors = [k.to(dtype), v.to(dtype), decay, first]
    gy = torch.randn(k.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    found = with_gradients(bi_wkv_triton, tensors, gy)
    expected = with_gradients(bi_wkv_triton, [x.float() for x in tensors], gy.float())
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth.to(ours.dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert [x.dtype for x in found] == [dtype, dtype, dtype, torch.float32, torch.float32]


@needs_kernels
@pytest.mark.usefixtures("small_programs")
def test_keys_and_values_may_differ_in_precision():
    k, v, decay, first = inputs(1, 10, 3)
    y, gk, gv, *_ = with_gradients(bi_wkv_triton, [k, v.bfloat16(), decay, first], torch.ones_like(v))
    assert (y.dtype, gk.dtype, gv.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


@needs_kernels
@pytest.mark.usefixtures("small_programs")
def test_results_repeat_to_the_last_bit_and_do_not_depend_on_the_rest_of_the_batch():
    k, v, decay, first = inputs(2, 10, 3)
    gy = torch.ones_like(v)
    both = with_gradients(bi_wkv_triton, [k, v, decay, first], gy)
    again = with_gradients(bi_wkv_triton, [k, v, decay, first], gy)
    alone = with_gradients(bi_wkv_triton, [k[1:], v[1:], decay, first], gy[1:])
    assert all(torch.equal(a, b) for a, b in zip(both, again, strict=True))
    assert all(torch.equal(a[1:], b) for a, b in zip(both[:3], alone[:3], strict=True))


@needs_kernels
@pytest.mark.usefixtures("small_programs")
def test_a_token_without_weight_is_as_good_as_absent():
    k, v, decay, first = inputs(1, 20, 3)
    k[:, 5:9] = -math.inf
    assert_close([k, v, decay, first], relative=1e-5)


@needs_kernels
def test_nan_in_a_key_or_a_decay_stays_visible():
    k, v, decay, first = inputs(1, 4, 3)
    k[0, 1, 0] = decay[2] = math.nan
    y = bi_wkv_triton(k, v, decay, first)
    assert y.isnan().any(1).tolist() == [[True, False, True]]


@needs_kernels
def test_no_sequence_at_all_has_gradients_of_zero():
    k, v, decay, first = inputs(0, 4, 3)
    y, gk, _, gdecay, gfirst = with_gradients(bi_wkv_triton, [k, v, decay, first], v)
    assert y.shape == gk.shape == (0, 4, 3)
    assert gdecay.tolist() == gfirst.tolist() == [0.0, 0.0, 0.0]


@needs_kernels
@pytest.mark.usefixtures("small_programs")
def test_it_compiles_without_a_break_in_the_graph():
    tensors = inputs(1, 6, 3)
    gy = torch.ones_like(tensors[0])
    compiled = torch.compile(lambda *x: 2 * bi_wkv_triton(*x), backend="aot_eager", fullgraph=True)
    expected = with_gradients(lambda *x: 2 * bi_wkv_triton(*x), tensors, gy)
    found = with_gradients(compiled, tensors, gy)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_kernels
def test_the_operators_keep_the_rules_of_operators():
    leaves = [x.requires_grad_() for x in inputs(1, 2, 2)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fedseg.bi_wkv_triton, tuple(leaves), test_utils=checks)
    with torch.no_grad():
        y, carries, top = torch.ops.fedseg.bi_wkv_triton(*leaves)
        arguments = (y, *(leaf.detach() for leaf in leaves), carries, top)
    torch.library.opcheck(torch.ops.fedseg.bi_wkv_triton_backward, arguments, test_utils=checks[::2])


@needs_kernels
@pytest.mark.usefixtures("small_programs")
def test_it_runs_under_autocast_with_parameters_in_float32():
    k, v, decay, first = inputs(1, 6, 3)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = bi_wkv_triton(k.bfloat16(), v.bfloat16(), decay, first)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, bi_wkv_triton(k.bfloat16(), v.bfloat16(), decay, first))


@needs_kernels
def test_float64_is_refused():
    k, v, decay, first = inputs(1, 2, 2)
    with pytest.raises(ModelError, match=r"values of float32, bfloat16 or float16, got torch\.float64"):
        bi_wkv_triton(k, v.double(), decay, first)


@outside
def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(ModelError, match="on a GPU, got keys on the CPU"):
        bi_wkv_triton(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(3), torch.zeros(3))


@outside
def test_a_reason_is_given_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton_scan, "find_spec", lambda name: object())
    assert "no CUDA device" in (unavailable() or "")
    monkeypatch.setattr(triton_scan, "find_spec", lambda name: None)
    assert "not installed" in (unavailable() or "")


@outside
def test_triton_is_not_imported_before_it_is_used():
    program = "import sys, fedseg.layers.kernels.triton_scan; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@outside
@needs_triton
def test_all_of_it_holds_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "no CUDA device" not in done.stdout  # the reason for which they would have been skipped


@outside
@needs_triton
@pytest.mark.parametrize("name", ["chunk_sums", "carry", "mix", "gradient_sums", "gradients", "parameter_gradients"])
def test_the_kernels_compile_for_gpus_that_are_not_there(name, tmp_path, monkeypatch):
    """What the interpreter does not see: types, layouts, registers. With few rows, since each takes its time."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget

    from fedseg.layers.kernels import triton_kernels

    kernel = getattr(triton_kernels, name)
    fixed = {"LIMIT": 300, "LIMIT_U": 30, "ROWS": 2, "GROUPS": 2, "WIDTH": 32, "LENGTH": 4, "FROM_TOP": True}
    fixed = {key: value for key, value in fixed.items() if key in kernel.arg_names}
    halves = ("key", "value", "gradient", "out", "grad_key", "grad_value")
    numbers = ("tokens", "channels", "chunks", "rows")
    types = {
        argument: "constexpr"
        if argument in fixed
        else "*bf16"
        if argument in halves
        else "i32"
        if argument in numbers or argument.endswith(("_batch", "_token"))
        else "*fp32"
        for argument in kernel.arg_names
    }
    source = triton.compiler.ASTSource(kernel, types, {(kernel.arg_names.index(key),): fixed[key] for key in fixed})
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 2})
    assert "sm_80" in compiled.asm["ptx"]
    assert "st.global" in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 1000
