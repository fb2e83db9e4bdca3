"""Phantoms: repeatable persons, scanners that differ, and an ordinary Decathlon folder."""

import json

import nibabel as nib
import numpy as np
import pytest
from pydantic import ValidationError
from scipy import ndimage

from fedseg.config import TaskConfig
from fedseg.data.anatomy import draw_anatomy, smooth_noise
from fedseg.data.audit import audit_cohort
from fedseg.data.cohort import read_cohort
from fedseg.data.phantom import STRUCTURES, PhantomConfig, ScannerConfig, make_phantom, write_phantoms
from fedseg.errors import DataError

SMALL = {"shape": (24, 28, 28), "spacing": (11.0, 11.0, 11.0)}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def voxels(folder):
    return {path.name + path.parent.name: np.asarray(nib.load(path).dataobj) for path in folder.rglob("*.nii.gz")}


def dice(one, other, value=1):
    return 2 * ((one == value) & (other == value)).sum() / ((one == value).sum() + (other == value).sum())


def test_the_same_numbers_give_the_same_voxels(tmp_path):
    config = PhantomConfig(cases=2, **SMALL)
    one, two = (write_phantoms(tmp_path / name, config) for name in ("a", "b"))
    assert all(np.array_equal(array, voxels(two)[name]) for name, array in voxels(one).items())
    assert (one / "dataset.json").read_bytes() == (two / "dataset.json").read_bytes()


def test_a_phantom_is_pinned():
    """Changing an anatomy changes every number that was ever reported with phantoms: do it knowingly."""
    image, label = make_phantom(PhantomConfig(**SMALL), 0)
    assert [int((label == value).sum()) for value in (1, 2, 3)] == [914, 86, 158]
    assert float(image.mean()) == pytest.approx(332.86, rel=1e-3)


def test_every_case_and_every_seed_is_another_person():
    labels = [make_phantom(PhantomConfig(seed=seed, **SMALL), number)[1] for seed in (0, 1) for number in range(4)]
    for i, one in enumerate(labels):
        for other in labels[:i]:
            assert dice(one, other) < 0.97


def test_a_case_depends_on_its_number_and_not_on_its_cohort(tmp_path):
    whole = write_phantoms(tmp_path / "whole", PhantomConfig(cases=3, first=5, **SMALL))
    part = write_phantoms(tmp_path / "part", PhantomConfig(cases=1, first=7, **SMALL))
    name = "imagesTr/phantom_007.nii.gz"
    assert np.array_equal(nib.load(whole / name).dataobj, nib.load(part / name).dataobj)


SCANNERS = {
    "noise": ScannerConfig(noise=0.1),
    "bias_field": ScannerConfig(bias_field=0.6),
    "gamma": ScannerConfig(gamma=0.6),
    "blur": ScannerConfig(blur=15.0),
    "slice_thickness": ScannerConfig(slice_thickness=3),
    "invert": ScannerConfig(invert=True),
    "seed": ScannerConfig(seed=5),
    "contrast": ScannerConfig(contrast=0.4),
    "ct": ScannerConfig(modality="ct"),
}


@pytest.mark.parametrize("scanner", SCANNERS.values(), ids=SCANNERS)
def test_one_person_in_two_scanners_has_two_images_and_one_label(scanner):
    image, label = make_phantom(PhantomConfig(**SMALL), 3)
    other_image, other_label = make_phantom(PhantomConfig(scanner=scanner, **SMALL), 3)
    assert np.array_equal(label, other_label)
    assert not np.allclose(image / image.std(), other_image / other_image.std(), atol=0.05)


def test_settings_of_a_scanner_do_what_they_say():
    def scan(**settings):
        return make_phantom(
            PhantomConfig(scanner=ScannerConfig(**{"noise": 0.0, "bias_field": 0.0} | settings), **SMALL), 1
        )[0]

    plain, label = scan() / 1000, make_phantom(PhantomConfig(**SMALL), 1)[1]
    liver = label == 1
    assert (
        np.std(scan(noise=0.1)[liver]) / np.mean(scan(noise=0.1)[liver])
        > 1.5 * np.std(plain[liver]) / plain[liver].mean()
    )
    thick = scan(slice_thickness=4)
    assert all(np.array_equal(thick[first], thick[first + 3]) for first in range(0, 24, 4))
    sharp, blurred = (np.abs(np.diff(image, axis=0)).sum() / image.sum() for image in (plain, scan(blur=20.0)))
    assert blurred < 0.8 * sharp
    bright = plain > np.quantile(plain[plain > 0.05 * plain.max()], 0.9)
    inverted = scan(invert=True)
    assert inverted[bright].mean() < inverted[liver].mean()


def test_ct_values_are_hounsfield_units():
    config = PhantomConfig(scanner=ScannerConfig(modality="ct", contrast=0.0), structures=STRUCTURES)
    images, labels = zip(*(make_phantom(config, number) for number in range(3)), strict=True)
    for image, label in zip(images, labels, strict=True):
        assert image.min() > -1200
        assert image.max() < 700
        assert image[0, 0, 0] == pytest.approx(-1000, abs=150)
        means = [image[ndimage.binary_erosion(label == value)].mean() for value in (1, 2, 3, 4)]
        assert means == pytest.approx([110, 125, 150, 240], abs=40)
        assert np.array_equal(image, np.rint(image))


def test_volumes_are_those_of_a_slim_adult():
    config = PhantomConfig(structures=STRUCTURES)
    millilitres = np.prod(config.spacing) / 1000
    volumes = []
    for number in range(6):
        label = make_phantom(config, number)[1]
        volumes.append([(label == value).sum() * millilitres for value in range(1, 6)])
    liver, spleen, kidneys, spine, aorta = np.median(volumes, axis=0)
    assert 1000 < liver < 2200
    assert 90 < spleen < 350
    assert 150 < kidneys < 450
    assert 200 < spine < 1200
    assert 30 < aorta < 200
    assert np.min(volumes) > 10


def test_organs_lie_where_anatomists_expect_them():
    for number in range(4):
        _, label = make_phantom(PhantomConfig(structures=STRUCTURES, **SMALL), number)
        liver, spleen, kidneys, spine, aorta = (np.argwhere(label == value).mean(axis=0) for value in range(1, 6))
        assert liver[2] > spine[2] > spleen[2]  # W runs to the patient's right
        assert min(liver[0], spleen[0]) > kidneys[0]  # D runs upwards
        assert aorta[1] > spine[1]  # H runs to the front
        assert kidneys[1] < liver[1]
        sides = np.argwhere(label == 3)[:, 2] > spine[2]
        assert 0.3 < sides.mean() < 0.7


def test_every_tissue_takes_its_part_of_a_voxel():
    anatomy = draw_anatomy((24, 28, 28), np.random.default_rng(3), 1.0)
    assert sum(anatomy.share.values()) == pytest.approx(1, abs=1e-4)
    assert min(float(share.min()) for share in anatomy.share.values()) >= -1e-6


def test_without_variability_there_is_one_anatomy():
    one, two = (make_phantom(PhantomConfig(variability=0.0, **SMALL), number)[1] for number in (0, 1))
    assert min(dice(one, two, value) for value in (1, 2, 3)) > 0.9


def test_smooth_noise_is_smooth_and_of_unit_spread():
    field = smooth_noise((20, 30, 40), 4, np.random.default_rng(0))
    assert field.shape == (20, 30, 40)
    assert field.dtype == np.float32
    assert field.std() == pytest.approx(1, abs=1e-3)
    assert np.abs(np.diff(field, axis=2)).max() < 0.6


def test_the_folder_is_an_ordinary_decathlon_cohort(tmp_path):
    config = PhantomConfig(cases=3, spacing=(5.0, 4.0, 3.0), shape=(20, 24, 28))
    folder = write_phantoms(tmp_path / "phantoms", config)
    about = json.loads((folder / "dataset.json").read_text())
    assert about["numTraining"] == len(about["training"]) == 3
    assert about["labels"] == {"0": "background", "1": "liver", "2": "spleen", "3": "kidneys"}
    assert about["modality"] == {"0": "MRI"}
    task = TaskConfig(name="abdomen", modality="mr", labels=config.labels)
    audit = audit_cohort(read_cohort(folder), task, progress=False)
    assert audit.findings == ()
    assert [spread.median for spread in audit.fingerprint.spacing] == [5, 4, 3]
    assert [spread.median for spread in audit.fingerprint.shape] == [20, 24, 28]
    assert audit.fingerprint.orientations == {"RAS": 3}
    assert audit.fingerprint.intensity["99.5"].maximum > 1.2 * audit.fingerprint.intensity["99.5"].minimum


def test_phantoms_replace_phantoms_and_nothing_else(tmp_path):
    folder = write_phantoms(tmp_path / "a", PhantomConfig(cases=2, **SMALL))
    write_phantoms(folder, PhantomConfig(cases=1, **SMALL))
    assert len(list((folder / "imagesTr").iterdir())) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("three years")
    (tmp_path / "file").touch()
    for taken in ("mine", "file"):
        with pytest.raises(DataError, match="exists and is no cohort of phantoms; choose another folder"):
            write_phantoms(tmp_path / taken, PhantomConfig(cases=1, **SMALL))
    assert (tmp_path / "mine/thesis.txt").read_text() == "three years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file", "mine"]


def test_an_empty_folder_and_the_current_one_may_be_filled(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    write_phantoms(tmp_path / "empty" / ".." / "empty", PhantomConfig(cases=1, **SMALL))
    assert (tmp_path / "empty/dataset.json").is_file()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"structures": ()}, "needs at least one of liver, spleen, kidneys, spine, aorta"),
        ({"structures": ("liver", "liver")}, "each once"),
        ({"structures": ("heart",)}, "Input should be 'liver'"),
        ({"shape": (8, 48, 48)}, "each side must have 16 to 512 voxels"),
        ({"cases": 0}, "greater than 0"),
    ],
)
def test_phantoms_that_cannot_be_made_are_refused(changes, told):
    with pytest.raises(ValidationError, match=told):
        PhantomConfig(**changes)
