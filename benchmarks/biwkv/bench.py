"""How fast Bi-WKV is: every implementation against memory bandwidth, and against other formulations in PyTorch.

Run `python benchmarks/biwkv/bench.py [--quick] [--turns 5]`. Sizes are those of RWKV-UNet T, S and B at inputs of 224 and 512.

Times are CPU seconds of one thread, the least over turns; in each turn everything runs once, in random order, so that a noisy
machine disturbs all alike. The floor is what the data cost to move at the bandwidth of a large copy in the same run: forward
reads k and v and writes y (12 bytes per element in float32), backward reads k, v and the gradient of y and writes two gradients;
with what a backward pass that recomputes nothing would read besides, forward and backward are counted as 40 bytes.
Memory is the growth of a process's peak over a process of its own, inputs not counted, in units of one tensor of that size.

With a GPU, Triton is measured against its bandwidth and against a kernel with one thread per channel (`cuda_baseline.py`).
"""

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.biwkv.formulations import FORMULATIONS, is_feasible
from fedseg.layers.kernels import IMPLEMENTATIONS

SIZES = {
    "T at 224": [(784, 288), (196, 560)],
    "S at 224": [(784, 384), (196, 768)],
    "B at 224": [(784, 576), (196, 960)],
    "T at 512": [(4096, 288), (1024, 560)],
    "S at 512": [(4096, 384), (1024, 768)],
    "B at 512": [(4096, 576), (1024, 960)],
}
FORWARD, BOTH = 12, 40
"""Bytes per element that must move."""

Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 1 and inputs of 224 only, no other formulations")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        name, *size = arguments.memory
        print(json.dumps(peak_growth(name, *map(int, size))))
        return
    names = [name for name in ("cpp", "torch") if IMPLEMENTATIONS[name].unavailable() is None]
    sizes = [(1, *size) for label, pair in SIZES.items() for size in pair if not arguments.quick or "224" in label]
    if not arguments.quick:
        sizes += [(24, *size) for label, pair in SIZES.items() for size in pair if "224" in label]
    print(f"torch {torch.__version__}, one thread, bandwidth of a copy {bandwidth() / 1e9:.1f} GB/s\n")
    print(
        "| batch, tokens, channels | implementation | forward ms | x floor | forward + backward ms | x floor | memory |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for size in sizes:
        rows(size, {name: IMPLEMENTATIONS[name].call for name in names}, arguments.turns, memory=True)
    if not arguments.quick:
        print("\nOther formulations in PyTorch, and ours\n")
        print("| batch, tokens, channels | formulation | forward ms | x ours | forward + backward ms | x ours |")
        print("| --- | --- | ---: | ---: | ---: | ---: |")
        for size in [*((1, *size) for label, pair in SIZES.items() for size in pair if "224" in label), (24, 784, 576)]:
            calls = {name: call for name, call in FORMULATIONS.items() if is_feasible(name, *size)}
            rows(size, {"torch": IMPLEMENTATIONS["torch"].call, **calls}, min(3, arguments.turns), memory=False)
    if torch.cuda.is_available():
        from benchmarks.biwkv.cuda_baseline import gpu_rows

        for row in gpu_rows([(batch, *size) for pair in SIZES.values() for size in pair for batch in (1, 24)]):
            print(json.dumps(row))


def rows(
    size: tuple[int, int, int], calls: dict[str, Callable[..., torch.Tensor]], turns: int, *, memory: bool
) -> None:
    """Print a line per implementation."""
    batch, tokens, channels = size
    steps: dict[tuple[str, str], Step] = {}
    for name, call in calls.items():
        k, v, decay, first, gy = inputs(*size)
        leaves = [x.clone().requires_grad_() for x in (k, v, decay, first)]

        def forward(call: Callable[..., torch.Tensor] = call, given: tuple = (k, v, decay, first)) -> object:
            with torch.no_grad():
                return call(*given)

        def both(call: Callable[..., torch.Tensor] = call, leaves: list = leaves, gy: torch.Tensor = gy) -> object:
            return torch.autograd.grad(call(*leaves), leaves, gy)

        steps[name, "forward"], steps[name, "both"] = forward, both
    least = dict.fromkeys(steps, math.inf)
    speed = 0.0
    for _ in range(turns):
        speed = max(speed, bandwidth(turns=1))
        for key in random.sample(list(steps), len(steps)):
            least[key] = min(least[key], cpu_seconds(steps[key]))
    elements = batch * tokens * channels
    for name in calls:
        forward_s, both_s = least[name, "forward"], least[name, "both"]
        if memory:
            grown = subprocess.run(
                [sys.executable, __file__, "--memory", name, *map(str, size)],
                capture_output=True,
                text=True,
                check=True,
            )
            last = (
                f"{forward_s / (FORWARD * elements / speed):.1f}",
                f"{both_s / (BOTH * elements / speed):.1f} | {json.loads(grown.stdout):.1f}",
            )
        else:
            last = (f"{forward_s / least['torch', 'forward']:.1f}", f"{both_s / least['torch', 'both']:.1f}")
        where = ", ".join(map(str, size))
        print(f"| {where} | {name} | {1e3 * forward_s:.2f} | {last[0]} | {1e3 * both_s:.2f} | {last[1]} |", flush=True)


def inputs(batch: int, tokens: int, channels: int) -> tuple[torch.Tensor, ...]:
    """k, v, decay, first, and a gradient of y."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, channels)] * 2 + [(channels,)] * 2 + [(batch, tokens, channels)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def cpu_seconds(step: Step, at_least: float = 0.05) -> float:
    """CPU seconds of a step: the least of as many runs as fit into a moment, and of two at least."""
    least, spent, runs = math.inf, 0.0, 0
    while runs < 2 or spent < at_least:
        started = time.process_time()
        step()
        seconds = time.process_time() - started
        least, spent, runs = min(least, seconds), spent + seconds, runs + 1
    return least


def bandwidth(turns: int = 5) -> float:
    """Bytes per second that a copy reads and writes, far beyond the caches."""
    source = torch.ones(16 * 2**20)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / min(cpu_seconds(lambda: target.copy_(source)) for _ in range(turns))


def peak_growth(name: str, batch: int, tokens: int, channels: int) -> float:
    """Peak of forward and backward above what was there before, in tensors of `(batch, tokens, channels)`."""
    call = IMPLEMENTATIONS[name].call
    small = [x.requires_grad_() for x in inputs(1, 8, 8)[:4]]
    call(*small).sum().backward()  # code and the autograd engine are not counted
    k, v, decay, first, gy = inputs(batch, tokens, channels)
    leaves = [x.requires_grad_() for x in (k, v, decay, first)]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    call(*leaves).backward(gy)
    return 1024 * (resident("VmHWM") - before) / (4 * batch * tokens * channels)


def resident(what: str) -> int:
    """Memory of this process in kB, now (`VmRSS`) or at its peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


if __name__ == "__main__":
    main()
