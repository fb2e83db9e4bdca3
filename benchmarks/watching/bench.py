"""What watching costs: a deployed study whose exporters the real Prometheus scrapes every 5 seconds, against one without.

    python benchmarks/watching/bench.py [BLOCKS]

One study with three sites trains the light MLRU++. Blocks of rounds with exporters (the coordinator's and one per site, each a
process of its own, and Prometheus) and without take turns, so that both see the same machine. Two figures come out: the seconds
per round in both kinds of block, and, which noise touches less, the processor time of the exporters as a share of that of
the whole study. Prometheus itself is not counted; it has a machine of its own.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from fedseg.config import parse_experiment  # noqa: E402
from tests.integration.study import Study  # noqa: E402
from tests.prometheus import Prometheus  # noqa: E402

EXPERIMENT = """{
 "name": "watching",
 "task": {"name": "phantom", "modality": "mr", "labels": {"background": 0, "liver": 1, "spleen": 2, "kidneys": 3}},
 "data": {"validation_fraction": 0.34},
 "model": {"name": "mlru++", "preset": "light"},
 "training": {"patch_size": [32, 32, 32], "steps_per_epoch": 8},
 "federation": {"rounds": 10000, "min_sites": 3}
}"""
ROUNDS = 6
"""In a block; the first one, in which exporters and Prometheus start, is not counted."""
SCRAPE = "5s"
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: set[int]) -> float:
    """Processor time of processes, and of children of theirs that have ended."""
    total = 0.0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15])) / TICKS
    return total


def block(study: Study, folder: Path, watched: bool) -> tuple[list[float], float, float]:
    """Seconds of each counted round, and processor seconds per round of the study and of its exporters."""
    exporters, prometheus = [], None
    if watched:
        study.start("watch", "server", "metrics", study.run, "--port", study.metrics_port)
        exporters = ["watch"]
        for name in study.names:
            study.start_metrics(name)
            exporters.append(f"{name}-metrics")
        jobs = {"fedseg-coordinator": [study.metrics_port], "fedseg-site": [*study.site_metrics_ports.values()]}
        prometheus = Prometheus(folder, jobs, ["rules.yml", "site_rules.yml"], every=SCRAPE)
        study.wait_for(lambda: prometheus.scrapes(1 + len(study.names)), 60, "Prometheus finds everybody")
    labels = ["server", *(f"{name}-{part}" for name in study.names for part in ("service", "gate"))]
    first = study.rounds() + 1
    study.wait_for_round(first, 120)
    before = [cpu_seconds({pid for label in group for pid in study.family(label)}) for group in (labels, exporters)]
    study.wait_for_round(first + ROUNDS, 600)
    after = [cpu_seconds({pid for label in group for pid in study.family(label)}) for group in (labels, exporters)]
    rows = study.rows("SELECT seconds FROM rounds WHERE server_round > ? AND server_round <= ?", first, first + ROUNDS)
    for label in exporters:
        study.stop(label)
    if prometheus is not None:
        prometheus.close()
    of_study, of_exporters = ((late - early) / ROUNDS for early, late in zip(before, after, strict=True))
    return [row["seconds"] for row in rows], of_study, of_exporters


def main() -> None:
    """Take turns and compare."""
    blocks = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    seconds: dict[bool, list[float]] = {False: [], True: []}
    used: dict[bool, list[float]] = {False: [], True: []}
    exporters: list[float] = []
    with tempfile.TemporaryDirectory(prefix="b") as name:
        folder = Path(name)
        study = Study(folder, parse_experiment(EXPERIMENT), metrics=False)
        try:
            study.start_server()
            for site in study.names:
                study.start_service(site)
                study.start_gate(site)
            study.wait_for_round(2, 300)
            begun = time.monotonic()
            for number in range(blocks):
                for watched in (False, True) if number % 2 == 0 else (True, False):
                    rounds, of_study, of_exporters = block(study, folder / f"prometheus-{number}", watched)
                    seconds[watched] += rounds
                    used[watched].append(of_study)
                    exporters += [of_exporters] if watched else []
            elapsed = time.monotonic() - begun
        finally:
            study.close()
    print(f"{blocks} blocks of {ROUNDS} rounds each way, {elapsed:.0f} s; one scrape of each exporter every {SCRAPE}")
    print(f"{'':12}{'median s':>10}{'least':>8}{'most':>8}   per round;  processor s per round, median")
    for watched, label in ((False, "unwatched"), (True, "watched")):
        values = seconds[watched]
        print(
            f"{label:12}{median(values):10.2f}{min(values):8.2f}{max(values):8.2f}{'':15}{median(used[watched]):8.2f}"
        )
    print(f"watched / unwatched, median seconds per round: {median(seconds[True]) / median(seconds[False]):.4f}")
    print(
        f"watched / unwatched, processor time of the study's own processes: {median(used[True]) / median(used[False]):.4f}"
    )
    print(f"processor time of the four exporters: {100 * sum(exporters) / sum(used[True]):.2f} % of the study's")


if __name__ == "__main__":
    main()
