"""What can differ between hospitals, and how much each of five severities is.

Lengths are in voxels of the image as it is read (mm in a volume of 1 mm), so that one profile spoils a coarse and a fine
image alike. MR intensities are shares of bright tissue, the 99.5th percentile; CT is in Hounsfield units.

Severities are calibrated: a U-Net trained on clean images loses about 1, 3, 7, 15 and 30 points of Dice under each effect, MR
on hippocampus volumes, CT on phantoms (`fedseg data calibrate runs/clean`; the table is in simulations/LOG.md). Short of it at
severity 5 remain gamma-bright (3 points), gamma-dark (23), motion (14), dose (19), hu-offset (14) and window (5); gain and
orientation cost nothing, as a pipeline should have it. For annotators the points are those by which their labels disagree
with the ones that they started from: 11 to 15 for outlines at severity 5, more for missed and merged structures.
"""

from dataclasses import dataclass
from typing import Literal

Modality = Literal["mr", "ct"]
Stage = Literal["geometry", "resolution", "contrast", "shading", "artefact", "noise", "storage"]
Five = tuple[float, float, float, float, float]

STAGES: tuple[Stage, ...] = ("geometry", "resolution", "contrast", "shading", "artefact", "noise", "storage")
"""The order in which physics happens; effects follow it whatever their order in a file."""

SEVERITIES = (1, 2, 3, 4, 5)

FORMAT = 1
"""Raised whenever the same strengths would give other arrays."""


@dataclass(frozen=True)
class EffectKind:
    """One way in which an image differs."""

    stage: Stage
    strengths: Five
    """Of severity 1 to 5."""
    limits: tuple[float, float]
    """Strengths that make sense."""
    unit: str
    """What a strength counts."""
    imitates: str
    modalities: tuple[Modality, ...] = ("mr", "ct")


@dataclass(frozen=True)
class HabitKind:
    """One way in which an annotator differs."""

    strengths: Five
    limits: tuple[float, float]
    unit: str
    imitates: str


_MR: tuple[Modality, ...] = ("mr",)
_CT: tuple[Modality, ...] = ("ct",)

EFFECTS: dict[str, EffectKind] = {
    "coarser": EffectKind(
        "geometry", (1.35, 1.8, 2.5, 3.7, 5), (1, 10), "times the voxel size", "larger voxels, with their affine"
    ),
    "orientation": EffectKind(
        "geometry", (1, 2, 3, 4, 5), (1, 5), "number of the frame", "axes stored in another order"
    ),
    "field-of-view": EffectKind(
        "geometry", (0.97, 0.93, 0.885, 0.835, 0.76), (0.1, 1), "share kept of each side", "a tight box"
    ),
    "pose": EffectKind(
        "geometry", (8, 15, 21.5, 28.5, 36.5), (0, 45), "degrees, and fifths of a voxel", "a patient who lies askew"
    ),
    "thick-slices": EffectKind(
        "resolution", (2.3, 4, 6.7, 10, 14), (1, 20), "voxels per slice", "thick slices along one axis"
    ),
    "low-resolution": EffectKind(
        "resolution", (1.15, 1.8, 2.9, 4.2, 5.4), (1, 20), "voxels per voxel", "a coarse matrix"
    ),
    "blur": EffectKind(
        "resolution", (0.65, 0.95, 1.5, 2.1, 2.75), (0, 10), "voxels, standard deviation", "a soft kernel, lost focus"
    ),
    "gamma-bright": EffectKind(
        "contrast", (2.2, 3.5, 5, 7, 10), (1, 10), "root that is taken", "dark tissue turned up", _MR
    ),
    "gamma-dark": EffectKind(
        "contrast", (1.35, 1.8, 2.5, 4.8, 10), (1, 10), "power that is taken", "dark tissue turned down", _MR
    ),
    "contrast-curve": EffectKind(
        "contrast",
        (1.05, 1.4, 1.72, 2, 2.28),
        (0, 5),
        "bend: at 1 flat in places, then falling",
        "another field strength or echo time",
        _MR,
    ),
    "contrast-reversal": EffectKind(
        "contrast",
        (0.05, 0.075, 0.11, 0.165, 1),
        (0, 1),
        "share of voxels reversed, the darkest",
        "T1 weighting becomes T2 weighting",
        _MR,
    ),
    "bias-field": EffectKind(
        "shading",
        (0.145, 0.21, 0.29, 0.38, 0.46),
        (0, 2),
        "standard deviation of the log gain",
        "a surface coil, a high field",
        _MR,
    ),
    "motion": EffectKind(
        "artefact",
        (0.75, 1.5, 2.9, 5, 7.5),
        (0, 30),
        "voxels moved, and degrees",
        "a patient who moves twice during the scan",
        _MR,
    ),
    "ghosting": EffectKind(
        "artefact",
        (0.7, 1.2, 1.85, 2.55, 3.5),
        (0, 5),
        "times the signal taken off every fourth line",
        "breathing, pulse",
        _MR,
    ),
    "spike": EffectKind(
        "artefact",
        (0.12, 0.19, 0.28, 0.37, 0.48),
        (0, 10),
        "stripes' height in mean signals",
        "a spark, a loose cable",
        _MR,
    ),
    "gibbs": EffectKind(
        "artefact", (0.45, 0.58, 0.7, 0.77, 0.81), (0, 0.98), "share of k-space cut off", "too few lines: ringing", _MR
    ),
    "noise": EffectKind(
        "noise",
        (0.1, 0.17, 0.25, 0.36, 0.5),
        (0, 5),
        "share of bright tissue (Rician)",
        "low field, fast protocol",
        _MR,
    ),
    "gain": EffectKind(
        "storage", (0.1, 0.2, 0.4, 0.8, 1.6), (0, 10), "largest change of scale and offset", "other units", _MR
    ),
    "clipping": EffectKind(
        "storage",
        (0.06, 0.105, 0.165, 0.265, 0.48),
        (0, 0.49),
        "share of voxels at each end",
        "a saturated receiver",
        _MR,
    ),
    "grey-levels": EffectKind("storage", (18, 14, 11, 7, 5), (2, 65536), "grey levels", "storage in few bits", _MR),
    "sharp-kernel": EffectKind(
        "resolution", (1.1, 1.9, 2.9, 5, 9), (0, 20), "times the fine detail, added", "a bone kernel", _CT
    ),
    "metal": EffectKind(
        "artefact",
        (30, 57, 97, 160, 300),
        (0, 5000),
        "HU of the streaks",
        "an implant: streaks and a bright insert",
        _CT,
    ),
    "dose": EffectKind(
        "noise",
        (45, 80, 120, 170, 250),
        (0, 1000),
        "HU, standard deviation",
        "a low dose: noise with the grain of the kernel",
        _CT,
    ),
    "hu-offset": EffectKind(
        "storage", (40, 80, 120, 160, 200), (-1000, 1000), "HU", "a scanner out of calibration", _CT
    ),
    "window": EffectKind(
        "storage",
        (150, 100, 70, 50, 30),
        (10, 5000),
        "HU kept around soft tissue (40 HU)",
        "stored through a viewer's window",
        _CT,
    ),
}
"""Of scanners, by name."""

HABITS: dict[str, HabitKind] = {
    "generous": HabitKind(
        (0.03, 0.07, 0.12, 0.18, 0.25), (0, 1), "share of volume added", "outlines outside the border"
    ),
    "tight": HabitKind(
        (0.03, 0.07, 0.12, 0.18, 0.25), (0, 0.9), "share of volume left out", "outlines inside the border"
    ),
    "unsteady": HabitKind((0.3, 0.6, 1, 1.6, 2.5), (0, 3), "roughness", "a quick hand: the border wobbles"),
    "moved-face": HabitKind(
        (1, 1.5, 2, 3, 4), (0, 50), "voxels", "another rule for where one structure ends and the next begins"
    ),
    "flat": HabitKind(
        (0.7, 1, 1.5, 2, 3), (0, 20), "voxels, standard deviation", "smoothed slice by slice in one plane"
    ),
    "missed": HabitKind(
        (0.01, 0.03, 0.07, 0.15, 0.3), (0, 1), "chance, for each structure", "structures that were not labelled"
    ),
    "merged": HabitKind(
        (0.02, 0.05, 0.1, 0.25, 0.5), (0, 1), "chance, for each case", "neighbours under one label, the first's"
    ),
}
"""Of annotators, by name."""
