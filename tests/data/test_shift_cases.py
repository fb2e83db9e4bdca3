"""Simulated hospitals' cases: geometry, annotators, and both in the pipeline and its cache."""

import json

import numpy as np
import pytest
from scipy import ndimage

from fedseg.config import parse_experiment
from fedseg.data.cohort import read_cohort
from fedseg.data.preprocess import prepare_case, prepare_cohort
from fedseg.data.shift.annotators import annotate
from fedseg.data.shift.catalogue import HABITS, SEVERITIES
from fedseg.data.shift.geometry import place
from fedseg.data.shift.profiles import Annotator, Effect, Habit, ScannerProfile, Shift, load_profile, single_effect
from fedseg.data.volume import read_image, read_label, require_same_grid
from fedseg.federated.site import Site
from fedseg.site.config import SiteConfig
from tests.data.niftis import config, decathlon, save, task

TWO = {"background": 0, "front": 1, "back": 2}
SHAPE = (30, 36, 24)


def two_structures():
    """An ellipsoid `(x, y, z)` cut across y, and an image in which it is brighter than the rest."""
    mesh = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in SHAPE], indexing="ij")
    inside = (mesh[0] / 8) ** 2 + (mesh[1] / 12) ** 2 + (mesh[2] / 6) ** 2 < 1
    label = np.where(inside, np.where(mesh[1] > 2, 1, 2), 0).astype(np.uint8)
    texture = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SHAPE), 1)
    return (100 + 150 * ndimage.gaussian_filter(inside.astype(float), 0.5) + 20 * texture).astype(np.float32), label


@pytest.fixture
def case(tmp_path):
    image, label = two_structures()
    affine = np.array([[-1.0, 0, 0, 40], [0, 0, 1.5, -30], [0, 2.0, 0, 10], [0, 0, 0, 1]])  # turned and anisotropic
    save(tmp_path / "images" / "a.nii.gz", image, affine)
    save(tmp_path / "labels" / "a.nii.gz", label, affine)
    return read_cohort(tmp_path).cases[0]


def read(case):
    return read_image(case.images), read_label(case.label)


def annotator(name, severity=None, **settings):
    return Annotator(name=name, habits=(Habit(name=name, severity=severity, **settings),))


def dice(one, other, value):
    return 2 * ((one == value) & (other == value)).sum() / ((one == value).sum() + (other == value).sum())


@pytest.mark.parametrize("frame", [1, 2, 3, 4, 5])
def test_the_pipeline_undoes_another_order_of_axes(case, frame):
    profile = ScannerProfile(name="p", modality="mr", jitter=0.0, effects=(Effect(name="orientation", severity=frame),))
    volume, label = read(case)
    turned, turned_label = place(volume, label, profile, 0, "a")
    assert turned.geometry.affine != volume.geometry.affine
    assert turned.geometry.array_affine == pytest.approx(volume.geometry.array_affine)
    assert np.array_equal(turned_label.array, label.array)
    clean, seen = (
        prepare_case(case, task(labels=TWO), config(spacing=(1, 1, 1)), s) for s in (None, Shift(scanner=profile))
    )
    assert np.array_equal(seen.image, clean.image)
    assert np.array_equal(seen.label, clean.label)


def corners(geometry):
    """Outer corners of the field of view in mm."""
    ends = [(-0.5, n - 0.5) for n in geometry.array_shape]
    grid = np.array(np.meshgrid(*ends, [1], indexing="ij")).reshape(4, -1)
    return (geometry.array_affine @ grid)[:3]


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_larger_voxels_cover_the_same_field_of_view(case, severity):
    volume, label = read(case)
    coarse, coarse_label = place(volume, label, single_effect("coarser", severity), 0, "a")
    require_same_grid(coarse.geometry, coarse_label.geometry, "image and label")
    assert coarse.array.shape[1:] == coarse_label.array.shape == coarse.geometry.array_shape
    assert np.prod(coarse.spacing) > np.prod(volume.spacing)
    assert corners(coarse.geometry) == pytest.approx(corners(volume.geometry), abs=1e-9)
    sizes = [(one.array > 0).sum() * np.prod(one.geometry.spacing) for one in (label, coarse_label)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.15 if severity < 5 else 0.3)


def test_one_axis_can_have_larger_voxels(case):
    effect = Effect(name="coarser", strength=2.0, axis="D")
    volume, _ = place(*read(case), ScannerProfile(name="p", modality="mr", jitter=0.0, effects=(effect,)), 0, "a")
    clean = read(case)[0]
    assert np.divide(volume.spacing, clean.spacing) == pytest.approx([2, 1, 1])


@pytest.mark.parametrize("severity", SEVERITIES)
def test_a_smaller_field_of_view_keeps_whole_structures_where_they_are(case, severity):
    volume, label = read(case)
    seen, seen_label = place(volume, label, single_effect("field-of-view", severity), 0, "a")
    assert seen.array.size < volume.array.size
    assert (seen_label.array > 0).sum() == (label.array > 0).sum()
    where = [one.geometry.array_affine @ [*np.argwhere(one.array > 0).mean(axis=0), 1] for one in (label, seen_label)]
    assert where[1] == pytest.approx(where[0])


def test_image_and_label_lie_askew_together(case):
    volume, label = read(case)
    overlaps = []
    for severity in SEVERITIES:
        seen, seen_label = place(volume, label, single_effect("pose", severity), 0, "a")
        bright = seen.array[0] > 175
        assert 2 * (bright & (seen_label.array > 0)).sum() / (bright.sum() + (seen_label.array > 0).sum()) > 0.9
        overlaps.append(dice(seen_label.array > 0, label.array > 0, True))
    assert overlaps == sorted(overlaps, reverse=True)
    assert overlaps[-1] < 0.9


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(("name", "sign"), [("generous", 1), ("tight", -1), ("unsteady", 0), ("flat", 0)])
def test_outlines_change_the_volume_as_promised(name, sign, severity):
    _, label = two_structures()
    drawn = annotate(label, annotator(name, severity), 0, "a")
    promised = 1 + sign * HABITS[name].strengths[severity - 1]
    assert (drawn > 0).sum() / (label > 0).sum() == pytest.approx(promised, abs=0.005)
    assert drawn.dtype == label.dtype
    assert set(np.unique(drawn)) == {0, 1, 2}


@pytest.mark.parametrize("name", ["generous", "tight", "unsteady", "flat", "moved-face"])
def test_a_stronger_habit_agrees_less(name):
    _, label = two_structures()
    agreement = []
    for severity in SEVERITIES:
        drawn = annotate(label, annotator(name, severity), 0, "a")
        agreement.append(np.mean([dice(drawn, label, value) for value in (1, 2)]))
    assert agreement == sorted(agreement, reverse=True)
    assert agreement[-1] < 0.97


def test_a_moved_face_moves_nothing_else():
    _, label = two_structures()
    drawn = annotate(label, annotator("moved-face", 3), 0, "a")
    assert np.array_equal(drawn > 0, label > 0)
    changed = np.flatnonzero((drawn != label).any(axis=(0, 2)))
    assert len(changed) == 2  # two slices beside the face


def test_missed_structures_are_left_out_and_one_stays():
    _, label = two_structures()
    lost = 0
    for number in range(60):
        drawn = annotate(label, annotator("missed", strength=0.4), 0, f"case {number}")
        assert drawn.any()
        assert np.array_equal(drawn[drawn > 0], label[drawn > 0])
        lost += len(np.unique(drawn)) == 2
    assert 60 * 0.4 < lost < 60 * 0.9
    assert np.array_equal(annotate(label, annotator("missed", strength=0.0), 0, "a"), label)


def test_merged_structures_share_the_first_one_s_value():
    _, label = two_structures()
    assert np.array_equal(annotate(label, annotator("merged", strength=1.0), 0, "a"), (label > 0).astype(np.uint8))


def test_a_habit_can_be_about_one_structure():
    _, label = two_structures()
    drawn = annotate(label, annotator("tight", 4, structures=(2,)), 0, "a")
    assert np.array_equal(drawn == 1, label == 1)
    assert (drawn == 2).sum() < 0.9 * (label == 2).sum()


@pytest.mark.parametrize("name", HABITS)
def test_an_annotator_draws_a_case_the_same_every_time(name):
    _, label = two_structures()
    first, second = (annotate(label, annotator(name, 3), 5, "a") for _ in range(2))
    assert np.array_equal(first, second)


def test_a_scanner_leaves_labels_alone_and_an_annotator_leaves_images_alone(case):
    clean = prepare_case(case, task(labels=TWO), config())
    scanner = prepare_case(case, task(labels=TWO), config(), Shift(scanner=load_profile("low-field")))
    drawn = prepare_case(case, task(labels=TWO), config(), Shift(annotator=annotator("tight", 5)))
    assert np.array_equal(scanner.label, clean.label)
    assert not np.allclose(scanner.image, clean.image)
    assert np.array_equal(drawn.image, clean.image)
    assert (drawn.label > 0).sum() < (clean.label > 0).sum()


def test_other_units_are_gone_after_preparation(case):
    clean = prepare_case(case, task(labels=TWO), config())
    seen = prepare_case(case, task(labels=TWO), config(), Shift(scanner=single_effect("gain", 5)))
    assert seen.image == pytest.approx(clean.image, abs=1e-3)


def entries(cache):
    return len(list(cache.glob("*/*/entry.json")))


def test_the_cache_knows_a_shift_by_what_it_does(tmp_path):
    cohort, cache = read_cohort(decathlon(tmp_path / "data", ["a"])), tmp_path / "cache"

    def prepared(shift=None):
        return prepare_cohort(cohort, task(), config(), cache, shift=shift).cases[0]

    clean = prepared()
    assert entries(cache) == 1
    shift = Shift(scanner=single_effect("noise", 3))
    seen = prepared(shift)
    assert entries(cache) == 2
    assert not np.allclose(seen.image, clean.image)
    assert np.array_equal(prepared(shift).image, seen.image)
    renamed = shift.scanner.model_copy(update={"name": "another name", "description": "the same scanner"})
    prepared(Shift(scanner=renamed))
    assert np.array_equal(prepared().image, clean.image)
    assert entries(cache) == 2
    prepared(Shift(scanner=shift.scanner, seed=1))
    prepared(Shift(scanner=single_effect("noise", 4)))
    prepared(Shift(annotator=annotator("tight", 1)))
    assert entries(cache) == 5


def test_cases_with_equal_files_differ_in_name_and_so_in_noise(tmp_path):
    image, label = two_structures()
    for name in ("a", "b"):
        save(tmp_path / "images" / f"{name}.nii.gz", image)
        save(tmp_path / "labels" / f"{name}.nii.gz", label)
    shift = Shift(scanner=single_effect("noise", 3))
    a, b = prepare_cohort(read_cohort(tmp_path), task(labels=TWO), config(), tmp_path / "cache", shift=shift).cases
    assert not np.allclose(a.image, b.image)


@pytest.mark.parametrize("asked", [False, True])
def test_a_site_scores_against_its_annotator_only_if_asked(tmp_path, asked):
    image, label = two_structures()
    for name in "abcdef":
        save(tmp_path / "data" / "images" / f"{name}.nii.gz", image)
        save(tmp_path / "data" / "labels" / f"{name}.nii.gz", label)
    study = {
        "name": "shifted",
        "task": {"name": "halves", "modality": "mr", "labels": TWO},
        "data": {"validation_fraction": 0.34},
        "model": {"name": "unet", "options": {"widths": [2, 4]}},
        "training": {"patch_size": [8, 8, 8]},
        "federation": {"rounds": 1},
    }
    shift = Shift(scanner=single_effect("blur", 5), annotator=annotator("tight", 5), annotate_references=asked)
    places = {"data": str(tmp_path / "data"), "cache": str(tmp_path / "cache")}
    plain, moved = (
        Site(SiteConfig(name="A", shift=one, **places)).prepare(parse_experiment(json.dumps(study)))
        for one in (None, shift)
    )
    for part in ("training", "validation"):
        before, after = getattr(plain, part).cases, getattr(moved, part).cases
        assert [case.name for case in before] == [case.name for case in after]
        assert not np.allclose(before[0].image, after[0].image)
        same = np.array_equal(before[0].label, after[0].label)
        assert same == (part == "validation" and not asked)
