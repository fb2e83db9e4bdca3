"""Coverage-guided fuzzing: `python -m tests.fuzz.guided NAME SECONDS [FOLDER]`, or `make fuzz` for all decoders.

atheris (`pip install '.[fuzz]'`, Linux) watches which branches an input reaches and keeps those that reach new ones. The
search starts from real messages and files. Input that a decoder does not survive is left in FOLDER as `crash-...`; put it
among the seeds of its decoder when the fault is mended.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedseg", "zipfile", "json", "tomllib"]):
    from tests.fuzz.decoders import DECODERS, decode


def main(name: str, seconds: int, folder: Path) -> None:
    """Search for `seconds` seconds for input that one decoder does not survive; exits with an error if there is some."""
    corpus = Path(tempfile.mkdtemp(prefix="corpus-", dir=folder))
    for number, seed in enumerate(DECODERS[name].seeds):
        (corpus / str(number)).write_bytes(seed)
    limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=3000", "-max_len=20000"]
    atheris.Setup(
        [sys.argv[0], *limits, "-print_final_stats=1", f"-artifact_prefix={folder}/{name}-", str(corpus)],
        lambda data: decode(name, data),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    place = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(tempfile.mkdtemp(prefix="fedseg-fuzz-"))
    main(sys.argv[1], int(sys.argv[2]), place)
