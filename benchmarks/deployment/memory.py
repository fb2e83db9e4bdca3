"""Memory of the coordinator with 2 and with 20 sites, and with a model of 100 MB: real gates, fence and SuperLink, but scripted
updates.

    python benchmarks/deployment/memory.py

Prints the peak of the resident memory of each of the coordinator's processes, and seconds per round.
"""

import json
import os
import sys
import tempfile
import tomllib
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from fedseg.config import Experiment, parse_experiment  # noqa: E402
from fedseg.federated.networks import start_state  # noqa: E402
from fedseg.federated.weights import num_bytes  # noqa: E402
from tests.integration.study import PYTHON, Study, command_of  # noqa: E402

ROUNDS = 3
WAYS = ((2, 28), (20, 28), (2, 57))
"""Number of sites, and width of the network's first level."""
PROGRAMS = ("flwr-serverapp", "flower-superlink", "nginx: worker", "fedseg server")


def experiment(width: int, sites: int) -> Experiment:
    """A U-Net whose size grows with the square of its width."""
    widths = [width, 2 * width, 4 * width, 8 * width, 16 * width]
    return parse_experiment(
        json.dumps(
            {
                "name": "memory",
                "task": {"name": "phantom", "modality": "mr", "labels": {"background": 0, "liver": 1}},
                "model": {"name": "unet", "options": {"widths": widths}},
                "training": {"patch_size": [32, 32, 32]},
                "federation": {"rounds": ROUNDS, "min_sites": sites, "evaluate_every": ROUNDS},
            }
        )
    )


def measure(folder: Path, sites: int, width: int) -> tuple[float, dict[str, float], float]:
    """Megabytes of the model, peaks in MB by program, seconds per round."""
    wanted = experiment(width, sites)
    size = num_bytes(start_state(wanted).weights) / 1e6
    names = tuple(f"S{number:02d}" for number in range(sites))
    study = Study(folder, wanted, names, phantoms=False)
    peaks: dict[str, float] = {}

    def finished() -> bool:
        for pid in study.family("server"):
            program = next((name for name in PROGRAMS if name in command_of(pid)), None)
            if program is not None:
                peaks[program] = max(peaks.get(program, 0.0), peak_of(pid))
        return study.rounds() >= ROUNDS

    try:
        sockets = [tomllib.loads((study.site(name) / "site.toml").read_text())["socket"] for name in names]
        pairs = [f"{socket}={name}" for socket, name in zip(sockets, names, strict=True)]
        study.start_program("services", [str(PYTHON), str(ROOT / "benchmarks/deployment/scripted.py"), *pairs])
        study.start_server()
        for name in names:
            study.start_gate(name)
        study.wait_for(finished, 1500, "the study is finished")
        seconds = [row["seconds"] for row in study.rows("SELECT seconds FROM rounds WHERE server_round > 0")]
        return size, peaks, median(seconds)
    finally:
        study.close()


def peak_of(pid: int) -> float:
    """Largest resident memory that a process has had, in MB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), 0.0)


def main() -> None:
    """Measure all ways in turn."""
    os.environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = (
        "1.0"  # twenty gates on one machine would look for work all the time
    )
    print(f"{'sites':>5}{'model MB':>10}{'s/round':>9}" + "".join(f"{name:>18}" for name in PROGRAMS) + "   peak MB")
    for sites, width in WAYS:
        with tempfile.TemporaryDirectory(prefix="m") as folder:
            size, peaks, seconds = measure(Path(folder), sites, width)
        print(
            f"{sites:5}{size:10.1f}{seconds:9.1f}" + "".join(f"{peaks.get(name, 0):18.0f}" for name in PROGRAMS),
            flush=True,
        )


if __name__ == "__main__":
    main()
