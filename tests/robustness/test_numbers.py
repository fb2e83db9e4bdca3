"""Figures against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from fedseg.robustness.calibration import auroc, brier, ece, reliability
from fedseg.robustness.confidence import BINS, Confidence, confidence_of, ring
from fedseg.robustness.degradation import corruption_errors, degradations, ranks
from fedseg.robustness.hospitals import jain
from fedseg.robustness.paired import holm, wilcoxon
from fedseg.robustness.resampling import Resampling, Value, estimate


def logits_for(probabilities):
    """Logits `(K, 1, 1, N)` whose softmax is the given rows, one for each voxel."""
    return torch.tensor(probabilities).double().log().T[:, None, None]


def in_bins(**sums):
    """Fifteen bins, of which one or two are not empty."""
    return tuple(float(sums.get(f"b{number}", 0)) for number in range(BINS))


def test_confidence_and_brier_of_four_voxels():
    reference = np.array([[[1, 1, 0, 0]]], dtype=np.uint8)
    found = confidence_of(logits_for([[0.1, 0.9], [0.7, 0.3], [0.9, 0.1], [0.6, 0.4]]), reference)
    # Confidences 0.9 (right), 0.7 (wrong), 0.9 (right), 0.6 (right), in bins of a fifteenth.
    assert found.voxels == in_bins(b9=1, b10=1, b13=2)
    assert found.confidence == pytest.approx(in_bins(b9=0.6, b10=0.7, b13=1.8))
    assert found.correct == in_bins(b9=1, b10=0, b13=2)
    assert found.brier == pytest.approx(2 * 0.01 + 2 * 0.49 + 2 * 0.01 + 2 * 0.16)


def test_ece_is_that_of_all_voxels_together():
    cases = [
        ("anna", Confidence(in_bins(b9=1, b10=1, b13=2), in_bins(b9=0.6, b10=0.7, b13=1.8), in_bins(b9=1, b13=2), 1.34)),
        ("berta", Confidence(in_bins(b13=4), in_bins(b13=3.6), in_bins(b13=2), 2.0)),
    ]  # fmt: skip
    draws = Resampling(["anna", "berta"])
    # |1 - 0.6| + |0 - 0.7| + |4 - 5.4| over 8 voxels: errors of one bin cancel, those of different bins do not.
    found = estimate(ece(cases, draws))
    assert found["value"] == pytest.approx((0.4 + 0.7 + 1.4) / 8)
    # Persons drawn: both, 2.5 / 8; anna alone, (0.4 + 0.7 + 0.2) / 4; berta alone, 1.6 / 4.
    assert found["ci95"] == pytest.approx([2.5 / 8, 1.6 / 4])
    assert estimate(brier(cases, draws))["value"] == pytest.approx(3.34 / 8)
    diagram = reliability([case for _, case in cases])
    assert (diagram["accuracy"][13], diagram["confidence"][13]) == pytest.approx((4 / 6, 5.4 / 6))
    assert diagram["accuracy"][0] is None


def test_the_ring_is_four_voxels_wide_on_either_side_of_the_border():
    reference = np.zeros((1, 1, 40), dtype=np.uint8)
    reference[..., 10:30] = 2
    box, inside = ring(reference)
    numbers = np.arange(40)[box[2]][inside[0, 0]]
    assert [*numbers[:8], *numbers[-8:]] == [6, 7, 8, 9, 10, 11, 12, 13, 26, 27, 28, 29, 30, 31, 32, 33]
    assert len(numbers) == 20 + 8  # in a volume of one slice every voxel lies at the border


def test_the_inside_of_a_large_structure_is_not_in_the_ring():
    reference = np.zeros((30, 30, 30), dtype=np.uint8)
    reference[5:25, 5:25, 5:25] = 1
    box, inside = ring(reference)
    whole = np.zeros(reference.shape, dtype=bool)
    whole[box] = inside
    assert list(np.flatnonzero(whole[15, 15])) == [1, 2, 3, 4, 5, 6, 7, 8, 21, 22, 23, 24, 25, 26, 27, 28]


def test_corruption_errors_are_relative_to_the_reference():
    clean, ours = np.array(0.9), np.array([[0.8, 0.6], [0.9, 0.9]])
    clean_ref, theirs = np.array(0.8), np.array([[0.7, 0.5], [0.8, 0.8]])
    errors = corruption_errors(clean, ours, clean_ref, theirs)
    assert errors["ce"] == pytest.approx([(0.2 + 0.4) / (0.3 + 0.5), 0.2 / 0.4])
    assert errors["relative_ce"][0] == pytest.approx((0.1 + 0.3) / (0.1 + 0.3))
    assert math.isnan(errors["relative_ce"][1])  # what costs the reference nothing has no relative cost
    barely = np.array([[0.7, 0.5], [0.799, 0.795]])
    assert math.isnan(corruption_errors(clean, ours, clean_ref, barely)["relative_ce"][1])


def test_degradation_is_in_points_and_slight_shifts_weigh_more():
    found = degradations(np.array(0.9), np.array([[0.8, 0.6]]), severities=(1, 2))
    assert found["degradation"] == pytest.approx((10 + 30) / 2)
    assert found["weighted_degradation"] == pytest.approx((10 * 2 / 3 + 30 * 4 / 9) / (2 / 3 + 4 / 9))


def test_ranks_are_stable_until_they_turn():
    found = ranks({"a": 0.9, "b": 0.8}, {"a": np.array([[0.8, 0.1]]), "b": np.array([[0.7, 0.6]])})
    assert found == {"order": ["a", "b"], "tau": [1.0, -1.0], "best_stays": 0.5}
    assert ranks({"a": 0.9}, {"a": np.array([[0.8]])}) is None


def test_jains_index_is_one_for_equals_and_the_share_of_those_who_have_all():
    assert jain(np.array([[0.8], [0.8], [0.8]])) == pytest.approx([1.0])
    assert jain(np.array([[0.9], [0.0], [0.0]])) == pytest.approx([1 / 3])
    assert jain(np.array([[0.6], [0.8]])) == pytest.approx([1.4**2 / (2 * (0.36 + 0.64))])


def test_auroc_counts_pairs_and_halves_ties():
    once = np.ones((1, 4))
    assert auroc([True, True, False, False], [0.9, 0.4, 0.4, 0.1], once) == pytest.approx([3.5 / 4])
    twice = np.array([[1.0, 2.0, 1.0, 1.0]])
    assert auroc([True, True, False, False], [0.9, 0.4, 0.4, 0.1], twice) == pytest.approx([(2 + 2 * 1.5) / 6])
    assert math.isnan(auroc([False, False, False, False], [0.9, 0.4, 0.4, 0.1], once)[0])


def test_a_persons_cases_are_drawn_together():
    draws = Resampling(["anna", "berta"])
    values = [Value("anna", 1.0), Value("anna", 1.0), Value("berta", 0.0)]
    means = draws.mean(values)
    assert means[0] == pytest.approx(2 / 3)
    assert set(np.round(means[1:], 6)) == {0.0, round(2 / 3, 6), 1.0}
    assert draws.quantile(values, 0.5)[0] == 1.0


def test_what_is_undefined_has_no_value():
    draws = Resampling(["anna"])
    assert estimate(draws.mean([])) == {"value": None, "ci95": None}
    assert estimate(draws.mean([Value("anna", math.nan), Value("anna", 0.5)]))["value"] == 0.5


def test_holm_multiplies_the_smallest_most_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert wilcoxon([0.0, 0.0]) == 1.0
    assert wilcoxon([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 2**5)
