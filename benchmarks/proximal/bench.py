"""What FedProx costs per training step: none of it, its term in the autograd graph, our addition to the gradients.

Run `python benchmarks/proximal/bench.py [--repeats 9] [--device cpu]`. The three variants take turns, so that a noisy
machine disturbs all of them alike, in random order, the best of three steps each; a ratio is the median over turns of
(variant / mu = 0 in the same turn), and `mu = 0 again` shows what noise alone does to it. Times are CPU seconds on a CPU
(one thread), wall-clock on a GPU.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

from fedseg.losses import DiceCrossEntropy
from fedseg.training import add_proximal_gradient

MU = 0.01
NETWORKS = {"unet 0.5 M": (16, 32, 64, 128), "unet 10 M": (32, 128, 256, 640)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {arguments.device}, one thread, {arguments.repeats} turns, median (min-max)")
    titles = f"{'mu = 0 again':>22} {'in graph':>22} {'ours':>22} {'term alone, graph/ours':>24}"
    print(f"{'network':<12} {'patch':<10} {'mu = 0':>10} {titles}")
    for name, channels in NETWORKS.items():
        for side in (16, 48):
            measure(name, channels, side, arguments.repeats, torch.device(arguments.device))


def measure(name: str, channels: tuple[int, ...], side: int, repeats: int, device: torch.device) -> None:
    torch.manual_seed(0)
    model = UNet(3, 1, 3, channels, (2,) * (len(channels) - 1), num_res_units=0).to(device)
    weights = list(model.parameters())
    anchors = [weight.detach() + 0.01 for weight in weights]
    image = torch.randn(2, 1, side, side, side, device=device)
    label = torch.randint(0, 3, (2, 1, side, side, side), device=device)
    criterion = DiceCrossEntropy()
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)

    def step(loss_extra: Callable[[], Tensor] | None, gradient_extra: Callable[[], None] | None) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = criterion(model(image), label)
        if loss_extra:
            loss = loss + loss_extra()
        loss.backward()
        if gradient_extra:
            gradient_extra()
        nn.utils.clip_grad_norm_(weights, 12.0)
        optimizer.step()

    def in_graph() -> Tensor:
        return MU / 2 * torch.stack([(w - a).square().sum() for w, a in zip(weights, anchors, strict=True)]).sum()

    def ours() -> None:
        add_proximal_gradient(weights, anchors, MU)

    variants: list[Callable[[], None]] = [
        lambda: step(None, None),
        lambda: step(None, None),
        lambda: step(in_graph, None),
        lambda: step(None, ours),
    ]
    turns = []
    for _ in range(repeats + 2):
        seconds = [0.0] * len(variants)
        for index in random.sample(range(len(variants)), len(variants)):
            seconds[index] = min(clock(variants[index], device) for _ in range(3))
        turns.append(seconds)
    turns = turns[2:]
    terms = [(clock(lambda: in_graph().backward(), device), clock(ours, device)) for _ in range(repeats)]
    plain = statistics.median(turn[0] for turn in turns)
    again, graph, added = ([turn[index] / turn[0] for turn in turns] for index in (1, 2, 3))
    alone = [f"{1e3 * statistics.median(term[index] for term in terms):.2f}" for index in (0, 1)]
    network = f"{name.split()[0]} {sum(weight.numel() for weight in weights) / 1e6:.1f} M"
    ratios = " ".join(f"{spread(ratios):>22}" for ratios in (again, graph, added))
    print(
        f"{network:<12} {f'2x{side}^3':<10} {1e3 * plain:>7.1f} ms {ratios} {' / '.join(alone) + ' ms':>24}", flush=True
    )


def clock(action: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        torch.cuda.synchronize()
        return time.perf_counter() - started
    started = time.process_time()
    action()
    return time.process_time() - started


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"


if __name__ == "__main__":
    main()
