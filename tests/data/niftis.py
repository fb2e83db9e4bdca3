"""Small NIfTI files and cohorts, built where a test needs them."""

import json

import nibabel as nib
import numpy as np

from fedseg.config import DataConfig, TaskConfig

SHAPE = (12, 10, 8)


def save(path, array, affine=None, zooms=(1.0, 1.0, 1.0)):
    """Write an `(x, y, z[, c])` array; the default affine is RAS with the given spacing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*zooms, 1.0]) if affine is None else affine
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    nib.save(image, path)
    return path


def noise(seed=0, shape=SHAPE, mean=100.0, spread=10.0):
    return np.random.default_rng(seed).normal(mean, spread, shape).astype(np.float32)


def ball(shape=SHAPE, value=1):
    """A label of one structure in the middle."""
    mesh = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    return (value * (sum(m**2 for m in mesh) < 0.5)).astype(np.uint8)


def decathlon(root, names, labels=None):
    """A Decathlon folder with a usable case for each name."""
    for number, name in enumerate(names):
        save(root / "imagesTr" / f"{name}.nii.gz", noise(number))
        save(root / "labelsTr" / f"{name}.nii.gz", ball())
    listing = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    about = {"labels": labels or {"0": "background", "1": "ball"}, "modality": {"0": "MRI"}, "training": listing}
    (root / "dataset.json").write_text(json.dumps(about), encoding="utf-8")
    return root


def task(**changes):
    return TaskConfig(**({"name": "balls", "modality": "mr", "labels": {"background": 0, "ball": 1}} | changes))


def config(**changes):
    return DataConfig(**changes)
