"""Between spacings: the field of view stays, structures stay, thick slices do not ring."""

import numpy as np
import pytest

from fedseg.data.resample import resample_image, resample_label, resample_probabilities, resampled_shape, zoom


def ramp(shape):
    """Position along D in mm from the outer face, for 1 mm voxels."""
    return np.broadcast_to((np.arange(shape[0]) + 0.5)[:, None, None], shape).astype(np.float32)


def test_a_shape_covers_the_same_field_of_view():
    assert resampled_shape((40, 100, 101), (3.0, 1.0, 1.0), (1.5, 2.0, 2.0)) == (80, 50, 50)
    assert resampled_shape((1, 2, 3), (1.0, 1.0, 1.0), (50.0, 1.0, 1.0)) == (1, 2, 3)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (4.0, 1.0, 1.0)])
def test_positions_stay_where_they_are(spacing):
    image = ramp((24, 6, 6))
    finer = resample_image(image[None], (48, 6, 6), spacing)[0]
    assert finer[4:-4, 0, 0] == pytest.approx((np.arange(4, 44) + 0.5) / 2, abs=0.02)
    coarser = resample_image(image[None], (12, 6, 6), spacing)[0]
    assert coarser[2:-2, 0, 0] == pytest.approx((np.arange(2, 10) + 0.5) * 2, abs=0.02)


def test_an_image_stays_within_its_range():
    image = np.zeros((1, 10, 10, 10), dtype=np.float32)
    image[:, 5:] = 100
    for spacing in ((1.0, 1.0, 1.0), (5.0, 1.0, 1.0)):
        finer = resample_image(image, (23, 10, 10), spacing)
        assert (finer.min(), finer.max()) == (0, 100)


def test_thick_slices_are_not_interpolated_with_splines():
    image = np.zeros((1, 6, 4, 4), dtype=np.float32)
    image[:, 3] = 1
    linear = resample_image(image, (12, 4, 4), (5.0, 1.0, 1.0))
    assert sorted({round(float(v), 3) for v in np.unique(linear)}) == [0, 0.25, 0.75]


def test_shrinking_averages_instead_of_skipping():
    checks = np.indices((16, 16, 16)).sum(axis=0) % 2
    small = resample_image(checks[None].astype(np.float32), (8, 8, 8), (1.0, 1.0, 1.0))
    assert abs(small - 0.5).max() < 0.2


def test_labels_keep_their_values_and_their_volume():
    d, h, w = np.indices((20, 20, 20)) - 9.5
    label = np.zeros((20, 20, 20), dtype=np.uint8)
    label[d**2 + h**2 + w**2 < 49] = 3
    label[(d**2 + h**2 + w**2 < 49) & (w > 0)] = 7
    finer = resample_label(label, (40, 30, 20))
    assert finer.dtype == np.uint8
    assert sorted(np.unique(finer)) == [0, 3, 7]
    for value in (3, 7):
        assert (finer == value).sum() / 3 == pytest.approx((label == value).sum(), rel=0.05)


def test_scores_and_labels_agree_on_where_things_are():
    label = np.zeros((8, 8, 8), dtype=np.uint8)
    label[2:6, 3:7, 1:4] = 1
    scores = np.stack([label == 0, label == 1]).astype(np.float32)
    assert np.array_equal(resample_probabilities(scores, (16, 12, 8)), resample_label(label, (16, 12, 8)))
    assert np.array_equal(resample_probabilities(scores, (8, 8, 8)), label)


def test_the_same_shape_changes_nothing():
    label = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.uint8)
    assert np.array_equal(resample_label(label, (4, 5, 6)), label)
    assert np.array_equal(zoom(label, (4, 5, 6), order=0), label)
    image = label[None].astype(np.float32)
    assert np.array_equal(resample_image(image, (4, 5, 6), (1.0, 1.0, 1.0)), image)
