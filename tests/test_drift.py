"""The drift alarm: what it says of images that differ, and that it is silent where they do not."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage

from fedseg.data.features import describe
from fedseg.drift import FALSE_ALARMS, drift_of, site_drift
from fedseg.federated.fingerprint import fingerprint_of

SHAPE = (24, 28, 28)


def anatomy(seed):
    """A pattern that all share, detail of one's own, a little noise."""
    generator = np.random.default_rng(seed)
    shared = ndimage.gaussian_filter(np.random.default_rng(7).normal(size=SHAPE), 4)
    own = ndimage.gaussian_filter(generator.normal(size=SHAPE), 1.5)
    return scaled(shared / shared.std() + own / own.std() + 0.1 * generator.normal(size=SHAPE))


def scaled(image):
    return ((image - image.mean()) / image.std()).astype(np.float32)


def case_of(image, spacing=(1.0, 1.0, 1.0)):
    return describe(SimpleNamespace(image=image[None], spacing=spacing))


@pytest.fixture(scope="module")
def federation():
    return fingerprint_of(case_of(anatomy(seed)) for seed in range(60))


def noisy(image, seed):
    return scaled(image + 0.6 * np.random.default_rng(seed).normal(size=SHAPE))


def blurred(image, _seed):
    return scaled(ndimage.gaussian_filter1d(image, 2.5, axis=1))


def stepped(image, _seed):
    return scaled(np.tanh(4 * image))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (noisy, "noisier"),
        (blurred, "blurred along H"),
        (stepped, "other intensity shape"),
        (lambda image, _seed: -image, "contrast looks reversed"),
    ],
)
def test_the_alarm_says_what_is_different(federation, change, words):
    drifts = [drift_of(case_of(change(anatomy(seed), seed)), federation) for seed in range(100, 106)]
    assert all(drift.alarm and drift.distance > 1 for drift in drifts)
    assert all(any(word.startswith(words) for word in drift.words) for drift in drifts)
    together = site_drift([case_of(change(anatomy(seed), seed)) for seed in range(100, 106)], federation)
    assert together.alarm
    assert any(word.startswith(words) for word in together.words)


def test_another_part_of_the_body_is_told_by_a_layout_that_has_nothing_in_common(federation):
    common = np.array(federation.layout) - np.mean(federation.layout)
    other = np.random.default_rng(0).normal(size=len(common))
    other -= common * (other @ common) / (common @ common) + other.mean()
    odd = replace(case_of(anatomy(100)), layout=tuple(other.tolist()))
    assert drift_of(odd, federation).words[0].startswith("nothing lies where it usually does")


def test_larger_voxels_are_told_by_their_axis(federation):
    assert "larger voxels along D" in drift_of(case_of(anatomy(100), (3.0, 1.0, 1.0)), federation).words


def test_images_like_the_others_are_not_called_unusual(federation):
    cases = [case_of(anatomy(seed)) for seed in range(100, 160)]
    together = site_drift(cases, federation)
    assert together.unusual <= 2 * FALSE_ALARMS * len(cases)
    assert not together.alarm


def test_one_odd_image_does_not_make_an_odd_site(federation):
    cases = [case_of(anatomy(seed)) for seed in range(100, 120)]
    odd = case_of(-anatomy(120))
    assert site_drift([*cases, odd], federation).unusual >= 1
    assert not site_drift([*cases, odd], federation).alarm


def test_a_fingerprint_of_other_channels_is_an_error(federation):
    image = anatomy(0)
    with pytest.raises(ValueError, match="another number of channels"):
        drift_of(describe(SimpleNamespace(image=np.stack([image, image]), spacing=(1, 1, 1))), federation)
