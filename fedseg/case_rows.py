"""The scores of single cases, as a simulation keeps them: one row for each model, hospital, case and structure."""

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter

from fedseg.federated.checkpoint import write_durably


@dataclass(frozen=True)
class CaseRow:
    """One structure of one test case, segmented by one model. For simulations: it names cases."""

    run: str
    """The model's run."""
    site: str
    """The site whose test case it is, or whose view of a shared test case."""
    case: str
    person: str
    label: str
    dice: float
    hd95: float
    """In mm."""
    surface_dice: float
    volume_predicted: float
    """In mm³."""
    volume_reference: float
    """In mm³."""


def write_scores(path: Path, rows: Iterable[CaseRow]) -> None:
    """Write rows as CSV, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(field.name for field in fields(CaseRow))
    writer.writerows(astuple(row) for row in rows)
    write_durably(path, text.getvalue().encode())


def read_scores(path: Path) -> list[CaseRow]:
    """Read the rows of `write_scores`."""
    with path.open(newline="") as file:
        return TypeAdapter(list[CaseRow]).validate_python(list(csv.DictReader(file)))


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN of none."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
