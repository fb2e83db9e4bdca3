"""The smallest federation there is, against pfl-research 0.6: what does a whole process cost?

A network of 2,010 parameters, 8 sites with 4 volumes of 16^3, one SGD step per site and round, 20 rounds, FedAvg, full
participation. `ours` is the real round (screening, exact mean, run store, synced checkpoints), `pfl` is pfl-research in
memory, `loop` the floor: torch alone. The three must end with the same loss. They take turns, in a new order each time,
one thread each; wall and CPU seconds are those of the whole process, imports included.

`python benchmarks/peers/bench.py [--repeats 7]`. pfl-research lives in an environment of its own, `build/pfl`, which the first
call makes, with the torch of ours: else the comparison would be one of torch with torch.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[1] / "build" / "pfl" / "bin" / "python"
SCRIPTS = {"loop": "loop.py", "ours": "ours.py", "pfl": "pfl_research.py"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pfl", type=Path, default=ENVIRONMENT, help="python of the environment with pfl-research")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.pfl == ENVIRONMENT and not ENVIRONMENT.exists():
        make_environment()
    pythons = {"loop": sys.executable, "ours": sys.executable, "pfl": str(arguments.pfl)}
    print("torch:", {name: torch_version(python) for name, python in pythons.items()})
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SCRIPTS}
    shuffle = random.Random(0).sample
    for turn in range(arguments.repeats + 1):
        for name in shuffle(list(SCRIPTS), len(SCRIPTS)):
            wall, cpu, loss = run(pythons[name], HERE / SCRIPTS[name])
            if turn == 0:  # the first turn fills the page cache and the bytecode caches
                print(f"{name}: loss {loss:.6f}")
            else:
                found[name].append((wall, cpu))
    print(f"{arguments.repeats} turns, median (min-max) of whole processes")
    for name, runs in found.items():
        walls, cpus = zip(*runs, strict=True)
        print(f"{name:<6} wall {spread(walls)}   CPU {spread(cpus)}")
    for index, what in enumerate(("wall", "CPU")):
        ratios = [one[index] / other[index] for one, other in zip(found["ours"], found["pfl"], strict=True)]
        print(f"ours / pfl in the same turn, {what}: {spread(ratios, '')}")


def make_environment() -> None:
    """pfl-research in an environment of its own, torch first."""
    print(f"installing pfl-research into {ENVIRONMENT.parents[1]} (once)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT.parents[1]], check=True)
    for package in ("torch==2.13.0", "pfl[pytorch]==0.6.0"):
        subprocess.run([ENVIRONMENT, "-m", "pip", "install", "--quiet", package], check=True)


def run(python: str, script: Path) -> tuple[float, float, float]:
    """Wall and CPU seconds of a process, and the loss that it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    begun = time.monotonic()
    process = subprocess.Popen(
        [python, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{script.name} failed; run `{python} {script}` to see why")
    loss = json.loads(printed.splitlines()[-1])["loss"]
    return time.monotonic() - begun, usage.ru_utime + usage.ru_stime, loss


def torch_version(python: str) -> str:
    command = [python, "-c", "import importlib.metadata as m; print(m.version('torch'))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def spread(values, unit: str = " s") -> str:
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
