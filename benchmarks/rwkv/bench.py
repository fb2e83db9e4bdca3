"""What norms and implementations of Bi-WKV cost a training step of RWKV-UNet, side by side.

Run `python benchmarks/rwkv/bench.py [--preset t] [--patch 4 48 32] [--batch 2] [--turns 8]`. CPU seconds of one thread for
forward and backward, the least over turns; in each turn everything runs once, in random order. Ratios are to batch norm with
the first implementation of the list.
"""

import argparse
import math
import random
import time
from collections.abc import Callable

import torch

from fedseg.layers.kernels import IMPLEMENTATIONS, use_implementation
from fedseg.models import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("t", "s", "b"), default="t")
    parser.add_argument("--patch", type=int, nargs=3, default=(4, 48, 32))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--turns", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    image = torch.randn(arguments.batch, 1, *arguments.patch)
    networks = {
        norm: build_model("rwkv-unet", preset=arguments.preset, num_labels=3, norm=norm).train()
        for norm in ("batch", "instance", "group")
    }
    names = [name for name in ("cpp", "torch") if IMPLEMENTATIONS[name].unavailable() is None]
    steps = {("batch", name): step(networks["batch"], image, name) for name in names}
    steps |= {(norm, names[0]): step(networks[norm], image, names[0]) for norm in ("instance", "group")}
    least = dict.fromkeys(steps, math.inf)
    for _ in range(arguments.turns):
        for key in random.sample(list(steps), len(steps)):
            least[key] = min(least[key], steps[key]())
    first = least["batch", names[0]]
    print(
        f"rwkv-unet {arguments.preset}, batch {arguments.batch} of {'x'.join(map(str, arguments.patch))}, one thread\n"
    )
    print("| norm | Bi-WKV | CPU s per step | ratio |")
    print("| --- | --- | ---: | ---: |")
    for (norm, name), seconds in least.items():
        print(f"| {norm} | {name} | {seconds:.3f} | {seconds / first:.2f} |")


def step(network: torch.nn.Module, image: torch.Tensor, name: str) -> Callable[[], float]:
    """A forward and a backward pass that return their CPU seconds."""

    def run() -> float:
        with use_implementation(name):
            started = time.process_time()
            network(image).square().mean().backward()
            return time.process_time() - started

    return run


if __name__ == "__main__":
    main()
