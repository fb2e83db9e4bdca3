"""Bi-WKV as published implementations arrange it on a GPU, to compare with: a thread per batch and channel, and serial loops.

The arithmetic is that of the equation in `fedseg.layers.kernels`, with sums kept as `exp(maximum) * (a, b)` and maxima that
run along, as in the textbook. float32 only; other types are converted, as the published kernels do it.

How sure is this? The two kernels were compiled for the CPU, with the threads as a loop, and agreed with the definition in
float64; nvcc 13.0 compiled kernels and binding for sm_80, and the kernels for sm_90. They have never run on a GPU, nor has
`gpu_rows`: there was none.
"""

import statistics
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

KERNELS = r"""
struct Sum { float top, a, b; };  // exp(top) * (a, b)

__device__ inline Sum faded(Sum s, float w) { s.top -= w; return s; }

__device__ inline Sum plus(Sum s, float top, float a, float b) {
    const float larger = fmaxf(s.top, top);
    const float kept = expf(s.top - larger), added = expf(top - larger);
    return {larger, s.a * kept + a * added, s.b * kept + b * added};
}

__device__ inline Sum nothing() { return {-1e30f, 0.0f, 0.0f}; }

// states: a Sum per token, of all tokens behind it
__global__ void forward_kernel(int B, int T, int C, const float* k, const float* v, const float* decay, const float* first,
                               Sum* states, float* y, float* lse) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= B * C) return;
    const int c = thread % C;
    const float w = decay[c] / T, u = first[c] / T;
    const long start = (long)(thread / C) * T * C + c;

    Sum behind = nothing();
    for (int t = T - 1; t >= 0; t--) {
        const long at = start + (long)t * C;
        states[at] = behind;
        behind = plus(faded(behind, w), k[at], v[at], 1.0f);
    }
    Sum before = nothing();
    for (int t = 0; t < T; t++) {
        const long at = start + (long)t * C;
        const Sum rest = states[at];
        Sum all = plus(before, rest.top, rest.a, rest.b);
        all = plus(all, k[at] + u, v[at], 1.0f);
        y[at] = all.a / all.b;
        lse[at] = all.top + logf(all.b);
        before = plus(faded(before, w), k[at], v[at], 1.0f);
    }
}

// states and gradient_states: as above, of (exp(k) v, exp(k)) and of (g' y, g') with g' = gy exp(-lse)
__global__ void backward_kernel(int B, int T, int C, const float* k, const float* v, const float* decay, const float* first,
                                const float* y, const float* lse, const float* gy, Sum* states, Sum* gradient_states,
                                float* gk, float* gv, float* gw, float* gu) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= B * C) return;
    const int c = thread % C;
    const float w = decay[c] / T, u = first[c] / T;
    const long start = (long)(thread / C) * T * C + c;

    Sum behind = nothing(), g_behind = nothing();
    for (int t = T - 1; t >= 0; t--) {
        const long at = start + (long)t * C;
        states[at] = behind;
        gradient_states[at] = g_behind;
        behind = plus(faded(behind, w), k[at], v[at], 1.0f);
        g_behind = plus(faded(g_behind, w), -lse[at], gy[at] * y[at], gy[at]);
    }
    Sum before = nothing(), g_before = nothing();
    float sum_w = 0.0f, sum_u = 0.0f;
    for (int t = 0; t < T; t++) {
        const long at = start + (long)t * C;
        const Sum rest = states[at], g_rest = gradient_states[at];
        const float own = gy[at] * expf(k[at] + u - lse[at]);
        const float from_before = expf(k[at] + g_before.top), from_behind = expf(k[at] + g_rest.top);
        const float q = from_before * g_before.b + from_behind * g_rest.b + own;
        gv[at] = q;
        gk[at] = v[at] * q - (from_before * g_before.a + from_behind * g_rest.a + own * y[at]);
        sum_u += own * (v[at] - y[at]);
        sum_w -= expf(before.top + g_rest.top - w) * (before.a * g_rest.b - before.b * g_rest.a);
        sum_w -= expf(rest.top + g_before.top - w) * (rest.a * g_before.b - rest.b * g_before.a);
        before = plus(faded(before, w), k[at], v[at], 1.0f);
        g_before = plus(faded(g_before, w), -lse[at], gy[at] * y[at], gy[at]);
    }
    gw[thread] = sum_w;
    gu[thread] = sum_u;
}
"""

BINDING = r"""
#include <torch/extension.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

static const int THREADS = 32;  // small blocks spread few channels over many multiprocessors

std::vector<at::Tensor> forward(at::Tensor k, at::Tensor v, at::Tensor decay, at::Tensor first) {
    const c10::cuda::CUDAGuard guard(k.device());
    const int B = k.size(0), T = k.size(1), C = k.size(2);
    at::Tensor y = at::empty_like(k), lse = at::empty_like(k), states = at::empty({B, T, C, 3}, k.options());
    forward_kernel<<<(B * C + THREADS - 1) / THREADS, THREADS, 0, c10::cuda::getCurrentCUDAStream()>>>(
        B, T, C, k.data_ptr<float>(), v.data_ptr<float>(), decay.data_ptr<float>(), first.data_ptr<float>(),
        reinterpret_cast<Sum*>(states.data_ptr<float>()), y.data_ptr<float>(), lse.data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {y, lse};
}

std::vector<at::Tensor> backward(at::Tensor k, at::Tensor v, at::Tensor decay, at::Tensor first, at::Tensor y, at::Tensor lse,
                                 at::Tensor gy) {
    const c10::cuda::CUDAGuard guard(k.device());
    const int B = k.size(0), T = k.size(1), C = k.size(2);
    at::Tensor gk = at::empty_like(k), gv = at::empty_like(k), states = at::empty({2, B, T, C, 3}, k.options());
    at::Tensor gw = at::empty({B, C}, k.options()), gu = at::empty({B, C}, k.options());
    Sum* sums = reinterpret_cast<Sum*>(states.data_ptr<float>());
    backward_kernel<<<(B * C + THREADS - 1) / THREADS, THREADS, 0, c10::cuda::getCurrentCUDAStream()>>>(
        B, T, C, k.data_ptr<float>(), v.data_ptr<float>(), decay.data_ptr<float>(), first.data_ptr<float>(),
        y.data_ptr<float>(), lse.data_ptr<float>(), gy.data_ptr<float>(), sums, sums + (long)B * T * C, gk.data_ptr<float>(),
        gv.data_ptr<float>(), gw.data_ptr<float>(), gu.data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {gk, gv, gw.sum(0) / T, gu.sum(0) / T};
}
"""

DECLARATIONS = """
#include <torch/extension.h>
std::vector<at::Tensor> forward(at::Tensor, at::Tensor, at::Tensor, at::Tensor);
std::vector<at::Tensor> backward(at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor);
"""

SIZES = [
    (batch, tokens, channels)
    for batch in (1, 24)
    for tokens, channels in ((784, 288), (196, 560), (784, 384), (196, 768), (784, 576), (196, 960))
] + [(1, 4096, 576), (1, 1024, 960)]
"""(B, T, C) of RWKV-UNet T, S and B at 224 x 224, and of B at 512 x 512."""

BYTES = {"forward": 3, "both": 10}
"""Elements to move per token and channel: k, v, y, then k, v, y, denominator, gy, gk, gv as well."""


@cache
def load() -> ModuleType:
    """Compile the extension: `forward(k, v, decay, first) -> (y, lse)`, `backward(..., y, lse, gy) -> gradients`.

    Needs nvcc and a PyTorch built with CUDA. All tensors float32 and contiguous.
    """
    from torch.utils.cpp_extension import load_inline

    return load_inline(
        "fedseg_biwkv_baseline",
        cpp_sources=DECLARATIONS,
        cuda_sources=KERNELS + BINDING,
        functions=["forward", "backward"],
    )


class _Baseline(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, decay: Tensor, first: Tensor) -> Tensor:
        inputs = [x.float().contiguous() for x in (k, v, decay, first)]
        y, lse = load().forward(*inputs)
        ctx.save_for_backward(*inputs, y, lse)
        ctx.dtypes = [x.dtype for x in (k, v, decay, first)]
        return y.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, ...]:
        gradients = load().backward(*ctx.saved_tensors, gy.float().contiguous())
        return tuple(g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))


def bi_wkv_cuda(k_BTC: Tensor, v_BTC: Tensor, decay_C: Tensor, first_C: Tensor) -> Tensor:
    """The baseline with autograd."""
    y: Tensor = _Baseline.apply(k_BTC, v_BTC, decay_C, first_C)
    return y


def gpu_rows(
    sizes: list[tuple[int, int, int]] | None = None, *, turns: int = 20, with_baseline: bool = True
) -> list[dict[str, Any]]:
    """Time Triton, and the baseline in float32, on the current GPU.

    A call is timed as the host issues it, and as a CUDA graph, which leaves out what launches cost the host. The L2 cache is
    overwritten before each call, implementations take turns, and the median counts.

    Returns:
        Rows with implementation, batch, tokens, channels, dtype, mode (forward or both: forward and backward), issued (host
        or graph), ms, floor_ms (bytes over the bandwidth of a copy, measured here), ratio of these, gb_per_s of that copy.
    """
    from fedseg.layers.kernels.triton_scan import bi_wkv_triton

    bandwidth = _bandwidth()
    rows = []
    for batch, tokens, channels in sizes or SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            calls = {"triton": bi_wkv_triton}
            if with_baseline and dtype == torch.float32:
                calls["cuda, thread per channel"] = bi_wkv_cuda
            inputs = _inputs(batch, tokens, channels, dtype)
            for mode, elements in BYTES.items():
                floor = elements * batch * tokens * channels * dtype.itemsize / bandwidth * 1e3
                timed = {}
                for name, call in calls.items():
                    plain = _step(call, inputs, backward=mode == "both")
                    timed[name, "host"] = plain
                    timed[name, "graph"] = _graphed(plain)
                for (name, issued), ms in _medians(timed, turns).items():
                    rows.append(
                        {"implementation": name, "batch": batch, "tokens": tokens, "channels": channels,
                         "dtype": str(dtype).removeprefix("torch."), "mode": mode, "issued": issued, "ms": ms,
                         "floor_ms": floor, "ratio": ms / floor, "gb_per_s": bandwidth / 1e9}
                    )  # fmt: skip
    return rows


def _inputs(batch: int, tokens: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    k, v, gy = (torch.randn(batch, tokens, channels, device="cuda", dtype=dtype) for _ in range(3))
    decay, first = (torch.randn(channels, device="cuda") for _ in range(2))
    return [*(x.requires_grad_() for x in (k, v, decay, first)), gy]


def _step(call: Callable[..., Tensor], inputs: list[Tensor], *, backward: bool) -> Callable[[], object]:
    *leaves, gy = inputs

    def step() -> object:
        if backward:
            return torch.autograd.grad(call(*leaves), leaves, gy)
        with torch.no_grad():
            return call(*leaves)

    return step


def _graphed(step: Callable[[], object]) -> Callable[[], object]:
    """The same work as a CUDA graph; it is warmed up first, which also compiles."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _medians(timed: dict[Any, Callable[[], object]], turns: int) -> dict[Any, float]:
    """Milliseconds on the GPU; every candidate has a turn in each round."""
    spill = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    found: dict[Any, list[float]] = {key: [] for key in timed}
    for _ in range(turns):
        for key, step in timed.items():
            spill.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            found[key].append(begin.elapsed_time(end))
    return {key: statistics.median(times) for key, times in found.items()}


def _bandwidth() -> float:
    """Bytes per second that a large copy reads and writes together."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    ms = _medians({"copy": lambda: target.copy_(source)}, 20)["copy"]
    return 2 * source.numel() / ms * 1e3
