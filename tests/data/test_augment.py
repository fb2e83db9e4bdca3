"""Random changes to patches: repeatable, anatomically possible, and the same for image and label."""

import numpy as np
import pytest
from scipy import ndimage

from fedseg.data.augment import _along_bezier, _lower_resolution, build_augmentation, left_right_axis, mirror_pairs

SHAPE = (12, 16, 20)


def image(channels=1):
    mesh = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    return np.repeat(np.exp(-3 * (mesh**2).sum(axis=0))[None], channels, axis=0).astype(np.float32)


def label():
    return (image()[0] > 0.4).astype(np.uint8)


@pytest.mark.parametrize("kind", ["none", "light", "strong"])
def test_the_generator_decides_everything(kind):
    augment = build_augmentation(kind)
    for seed in range(6):
        one, other = (augment(image(2), label(), np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])


@pytest.mark.parametrize("kind", ["none", "light", "strong"])
def test_shapes_types_and_label_values_stay(kind):
    augment = build_augmentation(kind)
    for seed in range(20):
        changed, seg = augment(image(2), 5 * label(), np.random.default_rng(seed))
        assert (changed.shape, changed.dtype) == ((2, *SHAPE), np.float32)
        assert (seg.shape, seg.dtype) == (SHAPE, np.uint8)
        assert set(np.unique(seg)) <= {0, 5}
        assert np.isfinite(changed).all()


def test_nothing_is_changed_in_place():
    kept, seg = image(), label()
    for seed in range(10):
        build_augmentation("strong", [(1, 2)])(kept, seg, np.random.default_rng(seed))
    assert np.array_equal(kept, image())
    assert np.array_equal(seg, label())


@pytest.mark.parametrize("fill", [0.0, -1.0])
def test_a_patch_without_contrast_stays_finite(fill):
    augment = build_augmentation("strong")
    for seed in range(20):
        changed, _ = augment(np.full((1, *SHAPE), fill, np.float32), label() * 0, np.random.default_rng(seed))
        assert np.isfinite(changed).all()


def test_label_and_image_are_turned_together():
    augment = build_augmentation("strong")
    overlaps = []
    seg_before = np.zeros(SHAPE, dtype=np.uint8)
    seg_before[3:8, 2:8, 9:17] = 1
    for seed in range(60):
        changed, seg = augment(10 * seg_before[None].astype(np.float32), seg_before, np.random.default_rng(seed))
        found = changed[0] > (changed[0].min() + changed[0].max()) / 2
        overlaps.append(2 * (found & (seg > 0)).sum() / (found.sum() + (seg > 0).sum()))
    assert min(overlaps) > 0.75
    assert np.mean(overlaps) > 0.95


def test_low_resolution_does_not_move_the_image():
    for share in (0.5, 0.6, 0.9):
        lowered = _lower_resolution(image(), share)[0]
        assert lowered.shape == SHAPE
        assert ndimage.center_of_mass(lowered) == pytest.approx([(n - 1) / 2 for n in SHAPE], abs=0.02)


def test_half_of_the_light_ones_are_flipped():
    lopsided = np.zeros((1, *SHAPE), dtype=np.float32)
    lopsided[..., :10] = 1
    augment = build_augmentation("light")
    flipped = [augment(lopsided, label(), np.random.default_rng(seed))[0][0, 0, 0, 0] < 0.5 for seed in range(400)]
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.08)


def test_pairs_are_found_by_name():
    names = ["background", "Left Kidney", "Right Kidney", "Hippocampus_L", "Hippocampus_R", "lh-cortex", "rh-cortex",
             "kidneyleft", "kidneyright", "liver", "left lung", "lobe", "robe"]  # fmt: skip
    labels = {name: value for value, name in enumerate(names)}
    assert mirror_pairs(labels) == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert mirror_pairs({"background": 0, "liver": 1}) == []


def test_left_and_right_are_named_by_the_frame():
    assert [left_right_axis(code) for code in ("RAS", "LPI", "ARS", "ASL")] == [2, 2, 1, 0]


def test_a_curve_keeps_the_order_of_intensities_and_their_mean_and_spread():
    image = np.random.default_rng(1).normal(size=(2, 8, 8, 8)).astype(np.float32)
    augment = build_augmentation("none", curve=1.0)
    for seed in range(50):
        bent, _ = augment(image, np.zeros((8, 8, 8), np.uint8), np.random.default_rng(seed))
        assert bent.dtype == np.float32
        for before, after in zip(image, bent, strict=True):
            assert (np.diff(after.ravel()[before.ravel().argsort()]) >= 0).all()
            assert after.mean() == pytest.approx(before.mean(), abs=1e-4)
            assert after.std() == pytest.approx(before.std(), rel=1e-4)
            assert not np.allclose(after, before)


def test_curves_on_the_diagonal_change_nothing():
    image = np.random.default_rng(1).normal(size=(8, 8, 8)).astype(np.float32)
    assert _along_bezier(image, np.array([[1 / 3, 1 / 3], [2 / 3, 2 / 3]])) == pytest.approx(image, abs=1e-5)


def test_a_flat_patch_stays_as_it_is_under_a_curve():
    flat = np.ones((1, 4, 4, 4), np.float32)
    augment = build_augmentation("none", curve=1.0)
    assert (augment(flat, np.zeros((4, 4, 4), np.uint8), np.random.default_rng(0))[0] == 1).all()
