"""One array per message against one array per tensor, on a real SuperLink with two SuperNodes that send back what they get.

    python benchmarks/flower_wire/bench.py

Both ways carry the same 300 tensors, 10 MB, in the same run, in turn. Prints seconds per exchange and the ratio.
"""

import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.plain_flower import Deployment  # noqa: E402


def main() -> None:
    """Run the app of this folder and read its log."""
    with tempfile.TemporaryDirectory(prefix="wire") as folder:
        deployment = Deployment(Path(folder))
        try:
            deployment.start_superlink()
            for name in ("first", "second"):
                deployment.start_supernode(name, Path("unused"))
            deployment.start_run({"repeats": 3}, Path(__file__).parent)
            deployment.wait_until(lambda: deployment.finished("run"), 500, "the run is over")
            lines = [line.split()[1:] for line in deployment.log("run").splitlines() if line.startswith("RESULT")]
        finally:
            deployment.close()
    print(f"{'way':12}{'push s':>8}{'pull s':>8}{'total s':>9}")
    for way, *seconds in lines:
        print(f"{way:12}{seconds[0]:>8}{seconds[1]:>8}{seconds[2]:>9}")
    total = {way: median(float(line[3]) for line in lines if line[0] == way) for way in ("per-tensor", "one-array")}
    print(f"one array takes 1/{total['per-tensor'] / total['one-array']:.1f} of the time (medians)")


if __name__ == "__main__":
    main()
