"""A case as a simulated hospital has it: its protocol's grid, its scanner's look, its annotator's outlines."""

from dataclasses import replace

from fedseg.data.shift.annotators import annotate
from fedseg.data.shift.geometry import place
from fedseg.data.shift.profiles import Shift
from fedseg.data.shift.scanner import see_through
from fedseg.data.volume import LabelMap, Volume


def shifted(volume: Volume, label: LabelMap, shift: Shift, case: str) -> tuple[Volume, LabelMap]:
    """Image and label of a case at a simulated hospital.

    Args:
        volume: as read.
        label: on the same grid.
        shift: the hospital.
        case: name of the case.
    """
    if shift.scanner is not None:
        volume, label = place(volume, label, shift.scanner, shift.seed, case)
        volume = replace(volume, array=see_through(volume.array, shift.scanner, shift.seed, case))
    if shift.annotator is not None:
        label = replace(label, array=annotate(label.array, shift.annotator, shift.seed, case))
    return volume, label
