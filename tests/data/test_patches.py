"""Patches: an epoch depends on seed and number alone, and structures get their share."""

import dataclasses
import json

import numpy as np
import pytest

from fedseg.config import TrainingConfig, parse_experiment
from fedseg.data.patches import PatchSampler, cut
from fedseg.data.preprocess import PreparedCase, PreparedGeometry
from fedseg.data.volume import Geometry
from fedseg.federated import site as site_module
from fedseg.federated.messages import RoundInstructions
from fedseg.federated.networks import start_state
from fedseg.site.config import SiteConfig
from tests.data.niftis import decathlon

IDENTITY = ((1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0))


def case(name="a", shape=(20, 24, 28), fill=None, orientation="RAS"):
    """An image whose value is `fill`, or tells each voxel's position; labels 1 and 2 are single voxels."""
    image = (
        np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape) if fill is None else np.full((1, *shape), fill)
    )
    label = np.zeros(shape, dtype=np.uint8)
    first, last = (1, 1, 1), tuple(n - 2 for n in shape)
    label[first], label[last] = 1, 2
    geometry = PreparedGeometry(Geometry(shape[::-1], IDENTITY, orientation), tuple((0, n) for n in shape), shape)
    foreground = {1: np.array([first], dtype=np.int32), 2: np.array([last], dtype=np.int32)}
    return PreparedCase(name, name, image.astype(np.float32), label, (1.0, 1.0, 1.0), geometry, foreground)


def training(**changes):
    return TrainingConfig(**({"patch_size": (8, 8, 8), "augmentation": "none"} | changes))


def epoch(cases, index=0, seed=0, mirrored=(), **changes):
    batches = list(PatchSampler(cases, training(**changes), seed, mirrored).epoch(index))
    return [batch.image.numpy() for batch in batches], [batch.label.numpy() for batch in batches]


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip([*one[0], *one[1]], [*other[0], *other[1]], strict=True))


@pytest.mark.parametrize("augmentation", ["none", "light", "strong"])
def test_an_epoch_depends_on_seed_and_number_alone(augmentation):
    cases = [case("a"), case("b", (9, 9, 9)), case("c", (6, 30, 8))]
    settings = {"augmentation": augmentation, "steps_per_epoch": 4}
    sampler = PatchSampler(cases, training(**settings), seed=5)
    list(sampler.epoch(0))
    list(sampler.epoch(7))
    again = [batch.image.numpy() for batch in sampler.epoch(3)], [batch.label.numpy() for batch in sampler.epoch(3)]
    assert equal(again, epoch(cases, 3, seed=5, **settings))
    assert equal(again, epoch(cases[::-1], 3, seed=5, **settings))
    assert not equal(again, epoch(cases, 4, seed=5, **settings))
    assert not equal(again, epoch(cases, 3, seed=6, **settings))


def test_batches_are_tensors_of_one_size():
    batches = list(PatchSampler([case("a"), case("b", (4, 40, 5)), case("c")], training(), 0).epoch(0))
    assert [tuple(batch.image.shape) for batch in batches] == [(2, 1, 8, 8, 8)] * 2
    assert [tuple(batch.label.shape) for batch in batches] == [(2, 1, 8, 8, 8)] * 2
    assert str(batches[0].image.dtype) == "torch.float32"
    assert str(batches[0].label.dtype) == "torch.uint8"


def test_every_case_gives_one_patch_per_epoch():
    images, _ = epoch([case(str(n), fill=n) for n in range(5)], batch_size=2)
    seen = [image[0, 0, 0, 0] for batch in images for image in batch]
    assert len(seen) == 6
    assert sorted(seen[:5]) == [0, 1, 2, 3, 4]


def test_steps_per_epoch_count_whatever_the_number_of_cases():
    images, _ = epoch([case(str(n), fill=n) for n in range(3)], batch_size=2, steps_per_epoch=6)
    seen = [image[0, 0, 0, 0] for batch in images for image in batch]
    assert {value: seen.count(value) for value in set(seen)} == {0: 4, 1: 4, 2: 4}


def test_image_and_label_are_cut_at_the_same_place():
    whole = case()
    images, labels = epoch([whole], batch_size=1, steps_per_epoch=50)
    for image, label in zip(images, labels, strict=True):
        places = image[0, 0].astype(int)
        assert np.array_equal(whole.label.reshape(-1)[places], label[0, 0])


def share_with_foreground(share):
    _, labels = epoch([case()], batch_size=1, steps_per_epoch=400, foreground_share=share)
    return np.mean([label.any() for label in labels]), labels


def test_structures_get_their_share_of_patches():
    nothing, _ = share_with_foreground(0.0)
    all_of_them, labels = share_with_foreground(1.0)
    third, _ = share_with_foreground(0.33)
    assert all_of_them == 1
    assert nothing < 0.05
    assert third == pytest.approx(0.33, abs=0.08)
    # Each structure as often as any other, whatever its size.
    assert np.mean([(label == 1).any() for label in labels]) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_volume_smaller_than_the_patch_is_padded_with_its_smallest_value(share):
    small = case(shape=(5, 12, 6))
    small.image[:] += 3
    images, labels = epoch([small], batch_size=1, steps_per_epoch=20, foreground_share=share)
    for image, label in zip(images, labels, strict=True):
        outside = image[0, 0] == 3
        assert outside.sum() >= (8 - 5) * 8 * 8
        inside = image[0, 0][~outside]
        assert len(inside) in (5 * 8 * 6, 5 * 8 * 6 - 1)
        assert not label[0, 0][outside].any()


def test_cases_of_two_sites_with_one_name_are_padded_with_their_own_values():
    images, _ = epoch([case("a", (4, 8, 8), fill=-5), case("a", (4, 8, 8), fill=9)], batch_size=2)
    assert sorted((image.min(), image.max()) for image in images[0]) == [(-5, -5), (9, 9)]


@pytest.mark.parametrize(("orientation", "axis"), [("RAS", 2), ("LPS", 2), ("ARS", 1), ("ASR", 0)])
def test_the_flip_is_between_left_and_right_in_every_frame(orientation, axis):
    whole = case(shape=(8, 8, 8), orientation=orientation)
    plain = whole.image[0]
    flips = set()
    for _, _, patch in _flipped(whole):
        order = np.argsort(np.argsort(patch, axis=None)).reshape(patch.shape)  # scale and shift keep the order
        flips.add(next(a for a in (None, 0, 1, 2) if np.array_equal(order, plain if a is None else np.flip(plain, a))))
    assert flips == {None, axis}


def _flipped(whole):
    images, labels = epoch([whole], batch_size=1, steps_per_epoch=12, augmentation="light")
    return [(image, label, image[0, 0]) for image, label in zip(images, labels, strict=True)]


def test_left_and_right_change_names_in_a_flip():
    whole = case(shape=(8, 8, 8))
    whole.label[:] = 0
    whole.label[..., :4], whole.label[..., 4:] = 1, 2
    _, plain = epoch([whole], batch_size=1, steps_per_epoch=12, augmentation="light", foreground_share=0)
    _, named = epoch(
        [whole], batch_size=1, steps_per_epoch=12, augmentation="light", foreground_share=0, mirrored=[(1, 2)]
    )
    assert {int(label[0, 0, 0, 0, 0]) for label in plain} == {1, 2}
    assert {int(label[0, 0, 0, 0, 0]) for label in named} == {1}


def test_a_box_reaching_out_on_all_sides_is_filled():
    array = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2) + 1
    patch = cut(array, np.array([-1, -1, -1]), (4, 4, 4), np.array([0], dtype=np.float32))
    assert np.array_equal(patch[:, 1:3, 1:3, 1:3], array)
    assert patch.sum() == array.sum()
    beside = cut(array, np.array([9, 0, -7]), (2, 2, 2), np.array([4], dtype=np.float32))
    assert (beside == 4).all()


def test_a_sampler_needs_labelled_cases():
    with pytest.raises(ValueError, match="at least one case"):
        PatchSampler([], training(), 0)
    with pytest.raises(ValueError, match="a has no label and cannot be trained on"):
        list(PatchSampler([dataclasses.replace(case(), label=None)], training(), 0).epoch(0))


def test_a_site_names_left_and_right_for_its_patches(tmp_path, monkeypatch):
    given = []

    class Recording(PatchSampler):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            given.append(self)

    monkeypatch.setattr(site_module, "PatchSampler", Recording)
    decathlon(tmp_path / "data", ["a", "b", "c"])
    study = {
        "name": "sides",
        "task": {"name": "ears", "modality": "mr", "labels": {"background": 0, "left ear": 1, "right ear": 2}},
        "model": {"name": "unet", "options": {"widths": [2, 4]}},
        "training": {"patch_size": [8, 8, 8], "steps_per_epoch": 12, "batch_size": 1},
        "federation": {"rounds": 1},
    }
    experiment = parse_experiment(json.dumps(study))
    site = site_module.Site(
        SiteConfig(name="A", data=str(tmp_path / "data"), cache=str(tmp_path / "cache"), device="cpu")
    )
    weights = start_state(experiment).weights
    site(RoundInstructions(1, weights, experiment.to_json(), evaluate=False))
    # The files know a left ear only; in a flipped patch it must have become a right one.
    values = {int(value) for batch in given[0].epoch(0) for value in batch.label.unique()}
    assert values == {0, 1, 2}


def test_a_reversed_patch_is_one_of_the_negated_volume():
    """Its surrounding too: what lies outside a volume is dark, whichever way its contrast is."""
    small = case("a", (6, 30, 8))
    negated = dataclasses.replace(small, image=-small.image)
    settings = {"steps_per_epoch": 20, "batch_size": 1}
    reversed_ones, plain = (
        epoch([small], contrast_reversal=1.0, **settings),
        epoch([negated], contrast_reversal=1e-9, **settings),
    )
    assert equal(reversed_ones, plain)


def test_patches_are_reversed_as_often_as_asked_for():
    images, _ = epoch([case(fill=2.0)], contrast_reversal=0.25, steps_per_epoch=500, batch_size=1)
    share = sum(float(image.mean()) < 0 for image in images) / 500
    assert 0.18 < share < 0.32


def test_without_reversal_the_same_patches_are_drawn_as_ever():
    assert equal(epoch([case()], steps_per_epoch=5), epoch([case()], contrast_reversal=0.0, steps_per_epoch=5))
