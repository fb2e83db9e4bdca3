"""Phantoms: cohorts of made-up abdomens, anatomical enough to be hard, small enough for a CPU, free of patients.

A body with subcutaneous fat, muscle, spine, ribs, lung bases, vessels, stomach, bowel and the labelled organs. Shape,
pose and tissue vary from case to case; a `ScannerConfig` adds what differs from hospital to hospital.
"""

import json
import shutil
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator
from scipy import ndimage

from fedseg.config import Size3D, Spacing3D
from fedseg.data.anatomy import TISSUES, Anatomy, Field3D, draw_anatomy, smooth_noise
from fedseg.data.progress import shown
from fedseg.errors import DataError
from fedseg.sections import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section

Structure = Literal["liver", "spleen", "kidneys", "spine", "aorta"]

STRUCTURES: tuple[Structure, ...] = ("liver", "spleen", "kidneys", "spine", "aorta")

_SIGNAL: dict[str, tuple[float, float]] = {
    "air": (0.02, -1000),
    "fat": (0.95, -105),
    "muscle": (0.30, 55),
    "visceral fat": (0.86, -95),
    "liver": (0.54, 110),
    "spleen": (0.38, 125),
    "kidneys": (0.44, 165),
    "medulla": (0.34, 125),
    "spine": (0.62, 260),
    "cord": (0.20, 35),
    "aorta": (0.14, 160),
    "vein": (0.20, 150),
    "stomach": (0.36, 45),
    "bowel": (0.43, 70),
    "gallbladder": (0.24, 12),
    "lung": (0.05, -820),
    "rib": (0.16, 420),
    "colon": (0.34, 40),
    "gas": (0.02, -950),
    "pancreas": (0.58, 95),
}
"""Each tissue on a T1-weighted image, relative, and on a portal-venous CT, in Hounsfield units."""


_HU_RANGE = 1500.0
"""Hounsfield units from air to the brightest bone here."""


class ScannerConfig(Section):
    """How one hospital's images look; the defaults are a good scanner."""

    modality: Literal["mr", "ct"] = "mr"
    """`mr`: arbitrary units, gain differs from case to case. `ct`: Hounsfield units, rounded."""
    noise: NonNegativeFloat = 0.03
    """Standard deviation of the noise as a share of the intensity range (Rician for MR)."""
    bias_field: NonNegativeFloat = 0.15
    """MR: strength of the smooth shading, about its largest deviation from 1."""
    gamma: PositiveFloat = 1.0
    """Contrast curve; 1 is linear, below 1 brightens dark tissue."""
    blur: NonNegativeFloat = 0.0
    """Standard deviation in mm of a Gaussian that lowers the resolution."""
    slice_thickness: PositiveInt = 1
    """So many neighbouring slices along D are averaged."""
    invert: bool = False
    """Reverse bright and dark inside the body, as another sequence would."""
    contrast: Fraction = 0.1
    """How far tissue intensities differ from the table, drawn once per scanner from `seed`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of this scanner's own tissue contrast."""


class PhantomConfig(Section):
    """A cohort of phantoms."""

    cases: PositiveInt = 24
    """Number of cases, each its own person."""
    shape: Size3D = (40, 48, 48)
    """Voxels `(D, H, W)`."""
    spacing: Spacing3D = (6.5, 6.5, 6.5)
    """Voxel spacing in mm `(D, H, W)`. Anatomy fills the field of view whatever its size; the default is a slim adult."""
    structures: tuple[Structure, ...] = ("liver", "spleen", "kidneys")
    """Labelled organs in the order of their values, from 1; the others are drawn but not labelled."""
    variability: NonNegativeFloat = 1.0
    """Scale of the differences between persons; 0 gives one anatomy."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the anatomies and the noise."""
    first: Annotated[int, Field(ge=0)] = 0
    """Number of the first case; sites with one seed and distinct ranges have distinct persons."""
    scanner: ScannerConfig = ScannerConfig()

    @field_validator("structures")
    @classmethod
    def _structures_are_distinct(cls, names: tuple[Structure, ...]) -> tuple[Structure, ...]:
        if not names or len(set(names)) != len(names):
            raise ValueError(f"needs at least one of {', '.join(STRUCTURES)}, each once, got {list(names)}")
        return names

    @field_validator("shape")
    @classmethod
    def _shape_shows_organs(cls, shape: Size3D) -> Size3D:
        if min(shape) < 16 or max(shape) > 512:
            raise ValueError(f"each side must have 16 to 512 voxels, got {list(shape)}")
        return shape

    @property
    def labels(self) -> dict[str, int]:
        """Label names and values, as an experiment's task needs them."""
        return {"background": 0} | {name: value for value, name in enumerate(self.structures, start=1)}


def write_phantoms(path: Path, config: PhantomConfig, *, progress: bool = False) -> Path:
    """Write a cohort as a Decathlon folder; the same configuration gives the same voxels.

    Args:
        path: the folder; an existing cohort of phantoms there is replaced, anything else is not touched.
        config: how many, how large, which scanner.
        progress: show a bar.

    Raises:
        DataError: `path` holds something else, or cannot be written.
    """
    path = path.resolve()
    if path.exists() and not _is_phantom(path) and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path}: exists and is no cohort of phantoms; choose another folder")
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        for folder in ("imagesTr", "labelsTr"):
            (aside / folder).mkdir(parents=True)
        names = [f"phantom_{number:03d}" for number in range(config.first, config.first + config.cases)]
        for number, name in enumerate(shown(names, "Making phantoms", progress=progress), start=config.first):
            image, label = make_phantom(config, number)
            _save(image, aside / "imagesTr" / f"{name}.nii.gz", config)
            _save(label, aside / "labelsTr" / f"{name}.nii.gz", config)
        (aside / "dataset.json").write_text(json.dumps(_description(config, names), indent=1) + "\n", encoding="utf-8")
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def make_phantom(config: PhantomConfig, number: int) -> tuple[Field3D, NDArray[np.uint8]]:
    """One case.

    Args:
        config: size, structures, scanner.
        number: of the case; with `config.seed` it decides the anatomy.

    Returns:
        Image and label, `(D, H, W)` in RAS orientation.
    """
    anatomy = draw_anatomy(config.shape, np.random.default_rng((config.seed, number)), config.variability)
    # The scanner has a generator of its own: the same person can be seen through every scanner.
    image = _scan(anatomy, config, np.random.default_rng((config.seed, number, 1)))
    label = np.zeros(config.shape, dtype=np.uint8)
    for value, name in enumerate(config.structures, start=1):
        label[anatomy.where(name)] = value
    return image, label


def _scan(anatomy: Anatomy, config: PhantomConfig, generator: np.random.Generator) -> Field3D:
    """Signal, texture, contrast, resolution, shading, noise: in the order in which a scanner adds them."""
    scanner = config.scanner
    table = _scanner_table(scanner)
    image = np.zeros(config.shape, dtype=np.float32)
    differ = (0.04 if scanner.modality == "mr" else 0.01) * config.variability
    for tissue, share in anatomy.share.items():
        image += share * np.float32(table[tissue] * (1 + differ * generator.normal()))
    inside = 1 - anatomy.share["air"]
    image += differ * 0.6 * inside * smooth_noise(config.shape, 12, generator)
    image = np.clip(image, 0, 1.5)
    if scanner.invert:
        image = np.where(inside > 0.5, np.clip(1.05 - image, 0, None), image)
    image = _blur(image**scanner.gamma, config)
    if scanner.modality == "ct":
        grain = ndimage.gaussian_filter(generator.normal(size=config.shape), 0.6)
        return np.asarray(np.rint((image + scanner.noise * grain) * _HU_RANGE - 1000), dtype=np.float32)
    shading = np.exp(scanner.bias_field / 2 * np.clip(smooth_noise(config.shape, 3, generator), -2.5, 2.5))
    real, imaginary = generator.normal(0, scanner.noise, (2, *config.shape))
    gain = 10 ** generator.uniform(2.3, 3.1)
    return np.asarray(np.rint(np.hypot(image * shading + real, imaginary) * gain), dtype=np.float32)


def _scanner_table(scanner: ScannerConfig) -> dict[str, float]:
    """Each tissue's signal on this scanner: 0 to about 1."""
    spread = np.random.default_rng((scanner.seed, 7)).normal(0, scanner.contrast, len(TISSUES))
    if scanner.modality == "ct":
        return {
            name: (hu * (1 + s) + 1000) / _HU_RANGE for s, (name, (_, hu)) in zip(spread, _SIGNAL.items(), strict=True)
        }
    return {name: mr * float(np.exp(s)) for s, (name, (mr, _)) in zip(spread, _SIGNAL.items(), strict=True)}


def _blur(image: Field3D, config: PhantomConfig) -> Field3D:
    scanner = config.scanner
    if scanner.blur:
        image = ndimage.gaussian_filter(image, [scanner.blur / mm for mm in config.spacing])
    if scanner.slice_thickness > 1:
        starts = np.arange(0, config.shape[0], scanner.slice_thickness)
        counts = np.diff([*starts, config.shape[0]])
        thick = np.add.reduceat(image, starts, axis=0) / counts[:, None, None]
        image = np.repeat(thick, counts, axis=0)
    return image


def _save(array_DHW: NDArray[Any], path: Path, config: PhantomConfig) -> None:
    """Write with a RAS affine whose origin lies in the middle of the volume."""
    step_z, step_y, step_x = config.spacing
    affine = np.diag([step_x, step_y, step_z, 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * mm for n, mm in zip(config.shape[::-1], config.spacing[::-1], strict=True)]
    dtype = np.uint8 if array_DHW.dtype == np.uint8 else np.int16
    image = nib.Nifti1Image(array_DHW.transpose(2, 1, 0).astype(dtype), affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nib.save(image, path)


def _description(config: PhantomConfig, names: list[str]) -> dict[str, Any]:
    return {
        "name": "Phantom abdomens",
        "description": "Made by `fedseg data phantom`; no patient is in here.",
        "modality": {"0": "CT" if config.scanner.modality == "ct" else "MRI"},
        "labels": {str(value): name for name, value in config.labels.items()},
        "numTraining": len(names),
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "phantom": config.model_dump(mode="json"),
    }


def _is_phantom(path: Path) -> bool:
    try:
        return "phantom" in json.loads((path / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
