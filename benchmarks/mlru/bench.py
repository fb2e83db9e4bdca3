"""What layout, compilation, bfloat16 and recomputation do to time and memory of MLRU++, side by side.

Run `python benchmarks/mlru/bench.py [--case acdc] [--turns 3] [--threads 2]`. Every measurement is a process of its own, so
that its peak memory is its own. In each turn all variants run once, in random order, so that a noisy machine disturbs them
alike; a ratio is the median over turns of (plain / variant in the same turn): above 1 is faster or smaller than plain.

Seconds are the best of the repeats of one process, after a first step that is not counted (it compiles); CPU seconds are
those of all threads. Memory is the peak resident set of the process: interpreter and libraries, weights, activations. The
compiler's own memory counts too, unless its cache was warm. `forward` is inference mode, `train` forward and backward.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

CASES = {
    "acdc": {"preset": "acdc", "num_labels": 4, "patch_size": (16, 160, 160), "batch": 1},
    "light": {"preset": "light", "num_labels": 3, "patch_size": (40, 56, 40), "batch": 2},
}

VARIANTS = {
    "plain": "channels first, PyTorch's choice of convolution: what the released network does",
    "contiguous": "channels first, our convolutions",
    "channels last": "the default on a CPU",
    "bf16": "channels last, bfloat16 autocast",
    "compiled": "channels last, torch.compile of every block",
    "recomputed": "channels last, activation checkpointing",
    "recomputed bf16": "both",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--variant", choices=VARIANTS, action="append")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure, arguments.repeats, arguments.threads)))
        return
    variants = ["plain", *(v for v in arguments.variant or VARIANTS if v != "plain")]
    for case in arguments.case or CASES:
        for mode in ("forward", "train"):
            compare(case, mode, [v for v in variants if mode == "train" or "recomputed" not in v], arguments)


def compare(case: str, mode: str, variants: list[str], arguments: argparse.Namespace) -> None:
    turns = []
    for _ in range(arguments.turns):
        turn = {}
        for variant in random.sample(variants, len(variants)):
            turn[variant] = run(case, mode, variant, arguments)
            print(f"  {case} {mode} {variant}: {turn[variant]}", file=sys.stderr)
        turns.append(turn)
    shape = "x".join(map(str, CASES[case]["patch_size"]))
    print(
        f"\n{case}, batch {CASES[case]['batch']} of {shape}, {mode}, {arguments.threads} threads, {len(turns)} turns\n"
    )
    print("| variant | wall s | CPU s | peak MB | wall, times faster | CPU, times faster | memory, times smaller |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for variant in variants:
        medians = [statistics.median(turn[variant][key] for turn in turns) for key in ("wall", "cpu", "peak")]
        ratios = [ratio(turns, variant, key) for key in ("wall", "cpu", "peak")]
        print(
            f"| {variant} | {medians[0]:.2f} | {medians[1]:.2f} | {medians[2]:.0f} | {' | '.join(ratios)} |", flush=True
        )


def ratio(turns: list[dict], variant: str, key: str) -> str:
    ratios = [turn["plain"][key] / turn[variant][key] for turn in turns]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def run(case: str, mode: str, variant: str, arguments: argparse.Namespace) -> dict[str, float]:
    options = ["--repeats", str(arguments.repeats), "--threads", str(arguments.threads)]
    command = [sys.executable, __file__, "--measure", case, mode, variant, *options]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        sys.exit(f"{case} {mode} {variant} failed:\n{found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def measure(case: str, mode: str, variant: str, repeats: int, threads: int) -> dict[str, float]:
    import torch

    from fedseg.layers import conv
    from fedseg.models import build_model
    from fedseg.models.mlru import Block

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes = CASES[case]
    first = variant in ("plain", "contiguous")
    model = build_model(
        "mlru++",
        preset=sizes["preset"],
        num_labels=sizes["num_labels"],
        memory_format="contiguous" if first else "channels_last",
        checkpoint_activations="recomputed" in variant,
    ).train(mode == "train")
    image = torch.randn(sizes["batch"], 1, *sizes["patch_size"])
    if variant == "compiled":
        for module in model.modules():
            if isinstance(module, Block) or module in (model.skip, model.last):
                module.compile(dynamic=False)  # blocks of one shape share one graph; the whole network takes minutes

    def step() -> None:
        with torch.inference_mode(mode == "forward"):
            with torch.autocast("cpu", torch.bfloat16) if "bf16" in variant else nullcontext():
                outputs = model(image)
            if mode == "train":
                model.zero_grad(set_to_none=True)
                sum(logits.float().square().mean() for logits in outputs).backward()

    if variant == "plain":
        conv._takes_the_slow_path = never
    step()
    times = [clock(step) for _ in range(repeats)]
    wall, cpu = (min(pair[index] for pair in times) for index in (0, 1))
    return {"wall": wall, "cpu": cpu, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def never(_: object) -> bool:
    return False


def clock(step) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
