"""The admission test: every code of a defect is found in a case that has it."""

import json

import nibabel as nib
import numpy as np
import pytest

from fedseg.data.audit import WARNINGS, audit_cohort
from fedseg.data.cohort import PersonRule, read_cohort
from fedseg.data.preprocess import prepare_cohort
from fedseg.data.reasons import Reason
from tests.data.niftis import SHAPE, ball, config, decathlon, noise, save, task


def image(root):
    return root / "imagesTr/b.nii.gz"


def label(root):
    return root / "labelsTr/b.nii.gz"


def moved():
    affine = np.eye(4)
    affine[0, 3] = 30
    return affine


ERRORS = {
    Reason.MISSING_IMAGE: lambda root: image(root).unlink(),
    Reason.MISSING_LABEL: lambda root: label(root).unlink(),
    Reason.UNREADABLE: lambda root: image(root).write_bytes(image(root).read_bytes()[:-20]),
    Reason.WRONG_CHANNELS: lambda root: save(image(root), noise(shape=(*SHAPE, 2))),
    Reason.SHAPE_MISMATCH: lambda root: save(label(root), ball()[:-1]),
    Reason.AFFINE_MISMATCH: lambda root: save(label(root), ball(), moved()),
    Reason.ABSURD_SPACING: lambda root: save(image(root), noise(), zooms=(1, 1, 0.001)),
    Reason.NON_FINITE: lambda root: save(image(root), noise() * np.nan),
    Reason.CONSTANT_IMAGE: lambda root: save(image(root), noise() * 0),
    Reason.UNKNOWN_LABEL: lambda root: save(label(root), ball(value=7)),
    Reason.EMPTY_LABEL: lambda root: save(label(root), ball() * 0),
}


def sheared(root):
    affine = np.eye(4)
    affine[0, 1] = 0.5
    save(image(root), noise(1), affine)
    save(label(root), ball(), affine)


def without_codes(root):
    for path, data in ((image(root), noise(1)), (label(root), ball())):
        written = nib.Nifti1Image(data, None)
        written.header["pixdim"][1:4] = 1
        nib.save(written, path)


def tiny_structure(root):
    dot = np.zeros(SHAPE, dtype=np.uint8)
    dot[5, 5, 4] = 1
    save(label(root), dot)


CAUSES = {
    "duplicate-person": lambda root: save(image(root), noise(0)),
    "no-orientation": without_codes,
    "sheared": sheared,
    "not-hounsfield": lambda root: None,
    "absent-structure": lambda root: None,
    "unusual-volume": tiny_structure,
}


def audit(root, person="case", **changes):
    return audit_cohort(read_cohort(root, PersonRule.parse(person)), task(**changes), progress=False)


def test_every_code_has_a_cause_and_a_line():
    assert set(ERRORS) == set(Reason)
    assert {*CAUSES, "duplicate-image"} == set(WARNINGS)
    assert all(len(reason.explanation) > 10 for reason in Reason)


def test_a_good_cohort_has_no_findings(tmp_path):
    decathlon(tmp_path, ["a", "b", "c"])
    found = audit(tmp_path)
    assert found.findings == ()
    assert (found.total_cases, found.fingerprint.cases, found.fingerprint.persons) == (3, 3, 3)


@pytest.mark.parametrize("reason", ERRORS)
def test_an_error_is_found_in_the_case_that_has_it(tmp_path, reason):
    decathlon(tmp_path, ["a", "b", "c"])
    ERRORS[reason](tmp_path)
    (error,) = audit(tmp_path).errors
    assert (error.case, error.reason) == ("b", reason)
    assert "b" in error.detail


@pytest.mark.parametrize("reason", ERRORS)
def test_an_error_is_what_would_be_quarantined(tmp_path, reason):
    decathlon(tmp_path, ["a", "b", "c"])
    ERRORS[reason](tmp_path)
    prepared = prepare_cohort(read_cohort(tmp_path), task(), config(), tmp_path / "cache")
    assert prepared.quarantined == {"b": reason}


SETTINGS = {
    "not-hounsfield": {"modality": "ct"},
    "absent-structure": {"labels": {"background": 0, "ball": 1, "cube": 2}},
}


@pytest.mark.parametrize("reason", CAUSES)
def test_a_warning_is_given_for_the_case_that_deserves_it(tmp_path, reason):
    decathlon(tmp_path, ["a", "b", "c", "d"])
    CAUSES[reason](tmp_path)
    found = audit(tmp_path, **SETTINGS.get(reason, {}))
    assert found.errors == ()
    assert {warning.reason for warning in found.warnings} == {reason}
    everybody = reason in ("not-hounsfield", "absent-structure")
    assert [warning.case for warning in found.warnings] == (["a", "b", "c", "d"] if everybody else ["b"])


def test_one_image_twice_is_worse_under_two_persons(tmp_path):
    decathlon(tmp_path, ["p1_a", "p1_b", "p2_a"])
    for name in ("p1_b", "p2_a"):
        save(tmp_path / f"imagesTr/{name}.nii.gz", noise(0))
    found = audit(tmp_path, person="pattern:(p.)")
    assert [(warning.case, warning.reason) for warning in found.warnings] == [
        ("p1_b", "duplicate-image"),
        ("p2_a", "duplicate-person"),
    ]


def test_without_a_task_the_folders_own_labels_count(tmp_path):
    decathlon(tmp_path, ["a", "b"])
    save(tmp_path / "labelsTr/b.nii.gz", ball(value=4))
    (error,) = audit_cohort(read_cohort(tmp_path), progress=False).errors
    assert (error.case, error.reason) == ("b", Reason.UNKNOWN_LABEL)


def test_without_any_names_every_label_is_fine_but_none_is_not(tmp_path):
    for name, value in (("a", 1), ("b", 4), ("c", 0)):
        save(tmp_path / "images" / f"{name}.nii.gz", noise(value))
        save(tmp_path / "labels" / f"{name}.nii.gz", ball(value=value))
    found = audit_cohort(read_cohort(tmp_path), progress=False)
    assert [(error.case, error.reason) for error in found.errors] == [("c", Reason.EMPTY_LABEL)]
    assert set(found.fingerprint.volumes) == {"label 1", "label 4"}


def test_the_fingerprint_tells_what_the_cohort_looks_like(tmp_path):
    decathlon(tmp_path, ["a", "b"])
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    save(tmp_path / "imagesTr/b.nii.gz", noise(1).astype(np.int16), affine)
    save(tmp_path / "labelsTr/b.nii.gz", ball(), affine)
    print_ = audit(tmp_path).fingerprint
    assert print_.orientations == {"RAS": 1, "LPS": 1}
    assert print_.dtypes == {"float32": 1, "int16": 1}
    assert [spread.median for spread in print_.shape] == [8, 10, 12]
    assert [(spread.minimum, spread.maximum) for spread in print_.spacing] == [(1, 3), (1, 2), (1, 2)]
    voxels = int(ball().sum())
    assert (print_.volumes["ball"].minimum, print_.volumes["ball"].maximum) == (voxels, voxels * 12)
    assert print_.present == {"ball": 2}
    assert print_.intensity["50"].median == pytest.approx(100, abs=2)


def test_threads_do_not_change_the_report(tmp_path):
    decathlon(tmp_path, [f"case_{number}" for number in range(8)])
    image_ = tmp_path / "imagesTr/case_3.nii.gz"
    image_.write_bytes(b"")
    cohort = read_cohort(tmp_path)
    one, four = (audit_cohort(cohort, task(), progress=False, workers=workers).to_json() for workers in (1, 4))
    assert one == four
    assert json.loads(one)["findings"][0]["reason"] == "unreadable"
