"""From files to network input and back, and what happens to cases that cannot be used."""

import logging
import math

import nibabel as nib
import numpy as np
import pytest

from fedseg.data.cohort import Case, read_cohort
from fedseg.data.preprocess import (
    normalise,
    prepare_case,
    prepare_cohort,
    prepare_image,
    require_enough,
    restore,
)
from fedseg.data.reasons import Reason
from fedseg.data.volume import write_label
from fedseg.errors import CaseError, SiteAbstained
from tests.data.niftis import SHAPE, ball, config, decathlon, noise, save, task


def case_of(tmp_path, image, label, affine=None, name="a"):
    save(tmp_path / "images" / f"{name}.nii.gz", image, affine)
    save(tmp_path / "labels" / f"{name}.nii.gz", label, affine)
    return Case(name, (tmp_path / "images" / f"{name}.nii.gz",), tmp_path / "labels" / f"{name}.nii.gz", name)


def test_intensities_four_orders_of_magnitude_apart_become_comparable(tmp_path):
    anatomy = noise(mean=3, spread=1) ** 2 + 5 * ball()
    cases = [case_of(tmp_path, anatomy * gain, ball(), name=f"{gain:g}") for gain in (1.0, 30.0, 10000.0)]
    prepared = [prepare_case(case, task(), config()).image for case in cases]
    for image in prepared:
        assert image.dtype == np.float32
        assert image.mean() == pytest.approx(0, abs=0.02)
        assert image.std() == pytest.approx(1, abs=0.02)
        assert image == pytest.approx(prepared[0], abs=1e-4)


def test_an_outlier_does_not_squeeze_the_rest():
    image = noise()[None]
    spoilt = image.copy()
    spoilt[0, 0, 0, 0] = 1e9
    assert normalise(spoilt, config())[0, 1:] == pytest.approx(normalise(image, config())[0, 1:], abs=0.1)


def test_each_channel_has_a_scale_of_its_own():
    image = np.stack([noise(1, mean=10, spread=1), noise(2, mean=1e5, spread=300)])
    for channel in normalise(image, config()):
        assert channel.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("spacing", [None, (1.3, 1.3, 1.3), (2.0, 1.0, 1.0)])
def test_an_empty_surrounding_does_not_change_the_head(tmp_path, spacing):
    head = noise(shape=(20, 20, 20), mean=50, spread=10)
    padded = np.pad(head, 20)
    label = np.pad(ball((20, 20, 20)), 20)
    for name, image, seg in (("tight", head, ball((20, 20, 20))), ("wide", padded, label)):
        case_of(tmp_path, image, seg, name=name)
    tight, wide = (prepare_case(case, task(), config(spacing=spacing)) for case in read_cohort(tmp_path).cases)
    d, h, w = (n // 3 for n in wide.image.shape[1:])
    inner = wide.image[0, d + 3 : 2 * d - 3, h + 3 : 2 * h - 3, w + 3 : 2 * w - 3]
    # Statistics over the padding too would more than halve the spread.
    assert inner.std() == pytest.approx(tight.image[0, 3:-3, 3:-3, 3:-3].std(), rel=0.1)
    assert inner.mean() == pytest.approx(0, abs=0.15)


def test_a_ct_window_ends_at_one(tmp_path):
    image = np.linspace(-1000, 1000, math.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    prepared = prepare_case(case_of(tmp_path, image, ball()), task(modality="ct"), config(window=(-160.0, 240.0))).image
    assert (prepared.min(), prepared.max()) == (-1, 1)
    middle = np.abs(image.transpose(2, 1, 0) - 40).argmin()
    assert prepared.flat[middle] == pytest.approx(0, abs=0.01)


def test_a_mostly_constant_image_stays_finite():
    image = np.full((1, 20, 20, 20), 7, dtype=np.float32)
    image[0, 0, 0, 0] = 8
    assert np.isfinite(normalise(image, config())).all()


def test_the_box_of_what_is_not_zero_is_cut_out(tmp_path):
    image = np.zeros((20, 24, 28), dtype=np.float32)
    image[3:15, 5:15, 10:18] = noise()
    label = np.zeros(image.shape, dtype=np.uint8)
    label[6:9, 8:12, 12:16] = 1
    prepared = prepare_case(case_of(tmp_path, image, label), task(), config(crop="nonzero"))
    assert prepared.image.shape == (1, 8, 10, 12)
    assert prepared.geometry.box == ((10, 18), (5, 15), (3, 15))
    assert np.array_equal(restore(prepared.label, prepared.geometry), label.transpose(2, 1, 0))


def test_volumes_are_resampled_to_the_spacing(tmp_path):
    case = case_of(tmp_path, noise(), ball(), np.diag([1.0, 2.0, 3.0, 1.0]))
    prepared = prepare_case(case, task(), config(spacing=(1.5, 2.0, 2.0)))
    assert prepared.image.shape == (1, 16, 10, 6)
    assert prepared.label.shape == (16, 10, 6)
    assert prepared.spacing == pytest.approx((1.5, 2.0, 2.0))


def test_foreground_voxels_lie_in_their_structure(tmp_path):
    label = ball()
    label[0, 0, 0] = 2
    prepared = prepare_case(
        case_of(tmp_path, noise(), label), task(labels={"background": 0, "ball": 1, "dot": 2}), config()
    )
    assert sorted(prepared.foreground) == [1, 2]
    assert prepared.foreground[2].tolist() == [[0, 0, 0]]
    for value, voxels in prepared.foreground.items():
        assert (prepared.label[tuple(voxels.T)] == value).all()


AFFINES = {
    "RAS": np.diag([1.0, 1.0, 2.0, 1.0]),
    "LPS": np.diag([-1.0, -1.0, 2.0, 1.0]),
    "sagittal": np.array([[0, 0, 2.0, 9], [-1, 0, 0, 4], [0, -1, 0, 7], [0, 0, 0, 1]]),
    "oblique": np.array([[0.94, -0.34, 0, 9], [0.34, 0.94, 0, 4], [0, 0, 2.0, 7], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize(
    "settings", [{}, {"spacing": (1.0, 0.8, 1.2), "crop": "nonzero"}, {"orientation": "ASR"}], ids=str
)
def test_a_prediction_lies_in_the_file_where_it_lay_in_the_network(tmp_path, affine, settings):
    shape = (20, 22, 16)
    label = ball(shape)
    label[:10][label[:10] > 0] = 2  # file axis x tells the halves apart
    image = noise(shape=shape, mean=50)
    image[:2] = 0
    case = case_of(tmp_path, image, label, affine)
    prepared = prepare_case(case, task(labels={"background": 0, "a": 1, "b": 2}), config(**settings))
    scores = np.stack([prepared.label == value for value in (0, 1, 2)]).astype(np.float32)
    for number, result in enumerate((prepared.label, scores)):
        out = tmp_path / f"{number}.nii.gz"
        write_label(out, restore(result, prepared.geometry), prepared.geometry.source)
        written = nib.load(out)
        assert np.allclose(written.affine, affine, atol=1e-5)
        again = np.asarray(written.dataobj)
        assert again.shape == label.shape
        for value in (1, 2):
            one, two = again == value, label == value
            assert 2 * (one & two).sum() / (one.sum() + two.sum()) > (0.93 if settings.get("spacing") else 0.999)


def test_a_result_of_another_size_is_not_put_back(tmp_path):
    prepared = prepare_case(case_of(tmp_path, noise(), ball()), task(), config())
    with pytest.raises(ValueError, match="the prepared image has"):
        restore(np.zeros((1, 2, 3), np.uint8), prepared.geometry)


def test_an_image_to_be_segmented_is_prepared_as_a_labelled_one(tmp_path):
    case = case_of(tmp_path, noise(), ball())
    alone = prepare_image(case.images, task(), config(spacing=(1.5, 1.5, 1.5)))
    labelled = prepare_case(case, task(), config(spacing=(1.5, 1.5, 1.5)))
    assert np.array_equal(alone.image, labelled.image)
    assert alone.geometry == labelled.geometry
    assert alone.label is None


@pytest.mark.parametrize(
    ("image", "label", "reason"),
    [
        (noise(), ball() * 9, Reason.UNKNOWN_LABEL),
        (noise(), ball() * 0, Reason.EMPTY_LABEL),
        (noise(), ball()[:-1], Reason.SHAPE_MISMATCH),
        (noise(shape=(*SHAPE, 2)), ball(), Reason.WRONG_CHANNELS),
        (noise() * np.nan, ball(), Reason.NON_FINITE),
        (noise() * 0, ball(), Reason.CONSTANT_IMAGE),
    ],
)
def test_a_case_that_cannot_be_used_says_why(tmp_path, image, label, reason):
    with pytest.raises(CaseError) as refused:
        prepare_case(case_of(tmp_path, image, label), task(), config())
    assert refused.value.reason == reason


def test_a_structure_that_vanishes_between_coarse_voxels_is_an_empty_label(tmp_path):
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[5, 5, 5] = 1
    with pytest.raises(CaseError, match="no structure is left at a spacing") as refused:
        prepare_case(case_of(tmp_path, noise(), label), task(), config(spacing=(8.0, 5.0, 6.0)))
    assert refused.value.reason == Reason.EMPTY_LABEL


def test_broken_cases_are_quarantined_and_the_others_go_on(tmp_path, caplog):
    decathlon(tmp_path, ["a", "b", "c", "d", "e"])
    (tmp_path / "imagesTr/b.nii.gz").write_bytes(b"broken")
    (tmp_path / "labelsTr/c.nii.gz").unlink()
    save(tmp_path / "labelsTr/d.nii.gz", ball(value=5))
    with caplog.at_level(logging.WARNING):
        prepared = prepare_cohort(read_cohort(tmp_path), task(), config(), tmp_path / "cache")
    assert [case.name for case in prepared.cases] == ["a", "e"]
    assert prepared.quarantined == {"b": "unreadable", "c": "missing-label", "d": "unknown-label"}
    assert "quarantined b (unreadable)" in caplog.text


def test_a_label_without_image_is_quarantined(tmp_path):
    save(tmp_path / "images/a.nii.gz", noise())
    save(tmp_path / "labels/a.nii.gz", ball())
    save(tmp_path / "labels/b.nii.gz", ball())
    save(tmp_path / "images/c.nii.gz", noise())
    prepared = prepare_cohort(read_cohort(tmp_path), task(), config(), tmp_path / "cache")
    assert prepared.quarantined == {"b": "missing-image", "c": "missing-label"}


def prepared_of(tmp_path, good, bad):
    decathlon(tmp_path, [f"{number:02d}" for number in range(good + bad)])
    for number in range(good, good + bad):
        (tmp_path / f"imagesTr/{number:02d}.nii.gz").unlink()
    return prepare_cohort(read_cohort(tmp_path), task(), config(), tmp_path / "cache"), good + bad


def test_a_site_with_too_few_cases_abstains(tmp_path):
    prepared, total = prepared_of(tmp_path, good=1, bad=0)
    with pytest.raises(SiteAbstained, match="1 usable cases of 1, need 2") as abstained:
        require_enough(prepared, total, config(min_cases=2))
    assert abstained.value.reason == "too-few-cases"
    require_enough(prepared, total, config(min_cases=1))


def test_a_site_with_too_many_broken_cases_abstains(tmp_path):
    prepared, total = prepared_of(tmp_path, good=2, bad=3)
    with pytest.raises(SiteAbstained, match="3 of 5 cases are quarantined") as abstained:
        require_enough(prepared, total, config(min_usable_share=0.5))
    assert abstained.value.reason == "too-many-quarantined"
    require_enough(prepared, total, config(min_usable_share=0.4))


def test_a_site_with_nothing_abstains(tmp_path):
    prepared, total = prepared_of(tmp_path, good=0, bad=2)
    with pytest.raises(SiteAbstained) as abstained:
        require_enough(prepared, total, config(min_usable_share=0.0))
    assert abstained.value.reason == "too-few-cases"


def test_a_spacing_that_would_fill_the_memory_sets_the_cases_aside(tmp_path, monkeypatch):
    monkeypatch.setattr("fedseg.data.preprocess.LARGEST_IMAGE", 1_000_000)
    save(tmp_path / "images/a.nii.gz", noise())
    save(tmp_path / "labels/a.nii.gz", ball())
    fine = config(spacing=(0.01, 0.01, 0.01))
    prepared = prepare_cohort(read_cohort(tmp_path), task(), fine, tmp_path / "cache")
    assert prepared.quarantined == {"a": "absurd-spacing"}
