import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedseg.metrics import LabelScore, bootstrap_ci, join_sums, means_from_sums, score_case

LABELS = {"background": 0, "liver": 1, "spleen": 2}


def cube(start, side=4, shape=(12, 12, 12), value=1):
    volume = np.zeros(shape, dtype=np.uint8)
    volume[tuple(slice(first, first + side) for first in start)] = value
    return volume


def score(prediction, reference, spacing=(1.0, 1.0, 1.0), **options):
    return score_case(prediction, reference, spacing, {"liver": 1}, **options)["liver"]


# ------------------------------------------------------------------------------------------------ numbers by hand


def test_dice_of_cubes_shifted_by_a_quarter():
    # 4x4x4 cubes that share 3x4x4 voxels: 2 * 48 / (64 + 64)
    assert score(cube((2, 2, 2)), cube((3, 2, 2))).dice == 0.75


def test_hd95_of_shifted_cubes_is_the_shift_in_mm():
    # of a cube's 56 surface voxels, 16 lie on the far face, a whole shift away from the other cube: more than 5 %
    spacing = (3.0, 1.0, 0.5)
    reference = cube((4, 4, 4))
    assert score(cube((5, 4, 4)), reference, spacing).hd95 == pytest.approx(3.0)
    assert score(cube((4, 5, 4)), reference, spacing).hd95 == pytest.approx(1.0)
    assert score(cube((4, 4, 6)), reference, spacing).hd95 == pytest.approx(1.0)


def test_surface_dice_of_shifted_cubes():
    # 3 mm slices, shifted by one: on each side 16 of 56 surface voxels are 3 mm off, the others at most 1 mm
    spacing, one, other = (3.0, 1.0, 1.0), cube((5, 4, 4)), cube((4, 4, 4))
    assert score(one, other, spacing, tolerance=1.0).surface_dice == pytest.approx(40 / 56)
    assert score(one, other, spacing, tolerance=3.0).surface_dice == 1.0


def test_a_distance_of_exactly_the_tolerance_is_near_enough():
    one, other = cube((5, 4, 4)), cube((4, 4, 4))
    assert score(one, other, (0.7, 0.7, 0.7), tolerance=0.7).surface_dice == 1.0


def test_volumes_are_in_cubic_millimetres():
    found = score(cube((2, 2, 2)), cube((2, 2, 2), side=2), (3.0, 0.5, 0.5))
    assert found.volume_predicted == pytest.approx(64 * 0.75)
    assert found.volume_reference == pytest.approx(8 * 0.75)


def test_a_cube_that_touches_the_border_has_a_surface_there():
    shape = (4, 4, 4)
    assert score(cube((0, 0, 0), shape=shape), cube((0, 0, 0), shape=shape)).surface_dice == 1.0


def test_labels_are_scored_each_on_its_own():
    reference = cube((0, 0, 0)) + cube((6, 6, 6), value=2)
    prediction = cube((0, 0, 0)) + cube((7, 6, 6), value=2)
    scores = score_case(prediction, reference, (1, 1, 1), LABELS)
    assert list(scores) == ["liver", "spleen"]
    assert (scores["liver"].dice, scores["spleen"].dice) == (1.0, 0.75)


# -------------------------------------------------------------------------------------------- the rule for nothing


def test_a_structure_that_neither_has_is_agreement():
    empty = np.zeros((4, 4, 4), dtype=np.uint8)
    assert score(empty, empty) == LabelScore(1.0, 0.0, 1.0, 0.0, 0.0)


def test_a_missed_or_invented_structure_costs_the_diagonal_of_the_volume():
    empty, found = np.zeros((12, 12, 12), dtype=np.uint8), cube((2, 2, 2))
    spacing = (3.0, 1.0, 0.5)
    diagonal = math.sqrt(36**2 + 12**2 + 6**2)
    missed, invented = score(empty, found, spacing), score(found, empty, spacing)
    assert (missed.dice, missed.surface_dice) == (invented.dice, invented.surface_dice) == (0.0, 0.0)
    assert missed.hd95 == invented.hd95 == pytest.approx(diagonal)


def test_without_surfaces_only_dice_and_volumes_are_there():
    found = score(cube((2, 2, 2)), cube((3, 2, 2)), surface=False)
    assert found.dice == 0.75
    assert math.isnan(found.hd95)
    assert math.isnan(found.surface_dice)


def test_arrays_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(12, 12, 12\) and \(3, 3, 3\)"):
        score(cube((2, 2, 2)), np.zeros((3, 3, 3), dtype=np.uint8))


# ------------------------------------------------------------------------------------------------------ properties

masks = st.integers(0, 2**32 - 1).map(
    lambda seed: (np.random.default_rng(seed).random((6, 7, 5)) < 0.3).astype(np.uint8)
)
spacings = st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 2.5])] * 3)


@given(masks, spacings)
def test_a_segmentation_agrees_with_itself(mask, spacing):
    found = score(mask, mask, spacing)
    assert (found.dice, found.hd95, found.surface_dice) == (1.0, 0.0, 1.0)


@given(masks, masks, spacings)
def test_prediction_and_reference_may_change_places(one, other, spacing):
    there, back = score(one, other, spacing), score(other, one, spacing)
    assert (there.dice, there.hd95, there.surface_dice) == (back.dice, back.hd95, back.surface_dice)


@given(masks, masks, spacings)
def test_twice_the_spacing_is_twice_the_distance(one, other, spacing):
    doubled = tuple(2 * step for step in spacing)
    assert score(one, other, doubled).hd95 == pytest.approx(2 * score(one, other, spacing).hd95)


@given(masks, masks, spacings, st.tuples(*[st.integers(0, 3)] * 3))
def test_more_background_around_changes_nothing(one, other, spacing, margin):
    def padded(mask):
        return np.pad(mask, [(extra, 3 - extra) for extra in margin])

    small, large = score(one, other, spacing), score(padded(one), padded(other), spacing)
    assert small.dice == large.dice
    assert (small.hd95, small.surface_dice) == pytest.approx((large.hd95, large.surface_dice))


@settings(deadline=None, max_examples=25)
@given(masks, masks, spacings)
def test_scores_are_those_of_monai(one, other, spacing):
    """Same definitions; MONAI's distances are float32, so HD95 agrees to 1e-5 mm and tolerances avoid exact distances."""
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    y_pred, y = (torch.from_numpy(np.stack([1 - mask, mask]))[None] for mask in (one, other))
    found = score(one, other, spacing, tolerance=0.9)
    assert found.dice == pytest.approx(compute_dice(y_pred, y, include_background=False).item(), abs=1e-6)
    hd95 = compute_hausdorff_distance(y_pred, y, percentile=95, spacing=list(spacing))
    assert found.hd95 == pytest.approx(hd95.item(), abs=1e-5)
    near = compute_surface_dice(y_pred, y, class_thresholds=[0.9], spacing=list(spacing))
    assert found.surface_dice == pytest.approx(near.item(), abs=1e-6)


# ------------------------------------------------------------------------------------------------------ over sites


def test_means_of_joined_sums_weigh_every_case_alike():
    one = {"cases": 2.0, "failures": 1.0, "dice/liver/sum": 1.0, "dice/liver/count": 2.0}
    other = {"cases": 1.0, "failures": 0.0, "dice/liver/sum": 0.8, "dice/liver/count": 1.0}
    means = means_from_sums(join_sums([one, other]))
    assert means == pytest.approx({"cases": 3, "failure_rate": 1 / 3, "dice/liver": 0.6, "dice": 0.6})


def test_a_metric_is_the_unweighted_mean_over_cases_and_labels():
    sums = {
        "cases": 2.0,
        "dice/liver/sum": 1.8,
        "dice/liver/count": 2.0,
        "dice/spleen/sum": 0.3,
        "dice/spleen/count": 1.0,
    }
    assert means_from_sums(sums)["dice"] == pytest.approx(0.7)


def test_means_of_nothing_are_left_out():
    assert means_from_sums({"cases": 0.0, "failures": 0.0, "dice/liver/sum": 0.0, "dice/liver/count": 0.0}) == {
        "cases": 0
    }


@given(st.permutations([{"dice/a/sum": 0.1 * n, "dice/a/count": 1.0, "cases": 1.0} for n in range(8)]))
def test_the_order_of_sites_does_not_matter(sites):
    assert join_sums(sites) == join_sums(sorted(sites, key=lambda one: one["dice/a/sum"]))


def test_metrics_need_no_torch():
    program = "import sys, fedseg.metrics; assert not {'torch', 'monai', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


# ------------------------------------------------------------------------------------------------------- bootstrap


def test_equal_values_leave_no_doubt():
    assert bootstrap_ci({"a": [0.5, 0.5], "b": [0.5]}) == (0.5, 0.5)


def test_persons_are_drawn_with_all_their_cases():
    # both draws the first person (1/4): 0; both the second: 1; one each (1/2): 1/4, since the first one has three cases
    values = {"a": [0.0, 0.0, 0.0], "b": [1.0]}
    assert bootstrap_ci(values) == (0.0, 1.0)
    low, high = bootstrap_ci(values, level=0.4)  # inside the quarter that each extreme has
    assert (low, high) == (0.25, 0.25)


def test_the_same_seed_gives_the_same_interval_whatever_the_order_of_persons():
    values = {str(person): [person / 10] for person in range(10)}
    backwards = dict(reversed(values.items()))
    assert bootstrap_ci(values, seed=3) == bootstrap_ci(backwards, seed=3)


def test_the_interval_is_about_that_of_the_normal_approximation():
    values = {str(person): [value] for person, value in enumerate(np.linspace(0, 1, 50))}
    half = 1.96 * np.std(np.linspace(0, 1, 50)) / math.sqrt(50)
    assert bootstrap_ci(values) == pytest.approx((0.5 - half, 0.5 + half), abs=0.01)


def test_a_person_without_values_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_ci({"a": []})
