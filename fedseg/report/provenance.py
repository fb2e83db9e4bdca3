"""What a run was computed with, as its store has it."""

import json
from pathlib import Path

from fedseg.coordinator.state import reader

NAMES = {"python": "Python", "monai": "MONAI"}
UNKNOWN = "not recorded"


def software_of(directory: Path) -> str:
    """Versions of the libraries with which the runs of a directory were computed, and those with which they went on."""
    with reader(directory) as store:
        runs = store("SELECT * FROM runs ORDER BY started")
        resumed = store("SELECT DISTINCT run, detail FROM events WHERE kind = 'resumed' AND detail != ''")
    known = [_told(row["software"] if "software" in row.keys() else None) for row in runs]  # noqa: SIM118 - row has values
    later = [f"later in {row['run']}: {row['detail']}" for row in resumed]
    return "; ".join([*dict.fromkeys(known), *later]) or UNKNOWN


def _told(recorded: str | None) -> str:
    found: dict[str, str] = json.loads(recorded or "{}")
    return ", ".join(f"{NAMES.get(name, name)} {version}" for name, version in found.items()) or UNKNOWN
