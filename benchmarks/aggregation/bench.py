"""Memory and time of our streaming mean against collecting all updates first, which is how Flower's FedAvg works.

Run `python benchmarks/aggregation/bench.py [--megabytes 10] [--sites 2 8 32 128] [--repeats 3]`. Every measurement is a
process of its own. Updates arrive one after the other, as bytes of our wire format; `streaming` folds each into the mean
and forgets it, `collecting` keeps them and averages at the end with the expression of Flower's strategies
(`np.multiply` by the site's share, then a sum). Memory is the peak above what the process held before the first update,
the message at hand and the result included. Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import reduce
from pathlib import Path

import numpy as np

from fedseg.federated.aggregation import StreamingMean
from fedseg.federated.messages import SiteUpdate
from fedseg.federated.weights import Weights

LAYERS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=10)
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.megabytes, arguments.sites[0])))
        return
    print(f"{arguments.megabytes} MB of weights, median of {arguments.repeats} processes each, in turns")
    print(f"{'sites':>6} {'streaming':>22} {'collecting':>22} {'memory':>8} {'time':>8}   ours / theirs")
    for sites in arguments.sites:
        found = {method: [] for method in METHODS}
        for _ in range(arguments.repeats):
            for method in METHODS:
                found[method].append(in_a_process(method, arguments.megabytes, sites))
        ours, theirs = (
            [statistics.median(one[key] for one in found[method]) for key in ("megabytes", "seconds")]
            for method in METHODS
        )
        shown = [f"{memory:>10.0f} MB {seconds:>6.2f} s" for memory, seconds in (ours, theirs)]
        print(f"{sites:>6} {shown[0]:>22} {shown[1]:>22} {ours[0] / theirs[0]:>8.2f} {ours[1] / theirs[1]:>8.2f}")


def in_a_process(method: str, megabytes: int, sites: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", method, "--megabytes", str(megabytes), "--sites", str(sites)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(method: str, megabytes: int, sites: int) -> dict[str, float]:
    generator = np.random.default_rng(0)
    size = megabytes * 1_000_000 // 4 // LAYERS
    base = {f"layer-{n}": generator.standard_normal(size, dtype=np.float32) * 1e-3 for n in range(LAYERS)}
    message = SiteUpdate("site", 1, base, 7).encode()
    del base
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, begun = resident("VmRSS"), time.perf_counter()
    METHODS[method](message, sites)
    return {"megabytes": resident("VmHWM") - before, "seconds": time.perf_counter() - begun}


def streaming(message: bytes, sites: int) -> Weights:
    mean = StreamingMean()
    for number in range(sites):
        mean.fold(f"site-{number}", received(message), number + 1)
    return mean.result()


def collecting(message: bytes, sites: int) -> Weights:
    updates = [(received(message), number + 1) for number in range(sites)]
    total = sum(weight for _, weight in updates)
    return {
        name: reduce(np.add, (delta[name] * np.float32(weight / total) for delta, weight in updates))
        for name in updates[0][0]
    }


def received(message: bytes) -> Weights:
    return SiteUpdate.decode(bytearray(message)).delta  # a copy, as every message from outside is


METHODS = {"streaming": streaming, "collecting": collecting}


def resident(field: str) -> float:
    """Resident memory in MB, now (`VmRSS`) or at its peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


if __name__ == "__main__":
    main()
