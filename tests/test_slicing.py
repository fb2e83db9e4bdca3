"""Slices of volumes: neighbours come from the volume, in training patches as in inference, along any axis."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from fedseg.config import TrainingConfig, parse_experiment
from fedseg.data.patches import PatchSampler
from fedseg.errors import ConfigError
from fedseg.federated.networks import new_model
from fedseg.inference import predict_logits
from fedseg.slicing import Slicing
from tests.data.test_patches import case

AXES = [0, 1, 2]


def neighbours_of(image_CDHW, count, axis):
    """By the definition, slice by slice; beyond the ends, the last one again."""
    length = image_CDHW.shape[1 + axis]
    steps = range(-(count // 2), count // 2 + 1)
    rows = [
        np.take(channel, np.clip(np.arange(length) + step, 0, length - 1), axis)
        for channel in image_CDHW
        for step in steps
    ]
    return np.stack(rows)


def experiment(**sections):
    values = {
        "name": "slices",
        "task": {"name": "toy", "modality": "mr", "labels": {"background": 0, "liver": 1}},
        "training": {"patch_size": [4, 32, 32]},
        "model": {"name": "rwkv-unet"},
        "federation": {"rounds": 1},
    }
    for key, given in sections.items():
        values[key] = {**values.get(key, {}), **given}
    return parse_experiment(json.dumps(values))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("count", [1, 3, 5])
def test_stacking_makes_neighbours_channels(axis, count):
    image = np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype(np.float32)
    slicing = Slicing(count, axis)
    stacked = slicing.stack(torch.from_numpy(slicing.widen(image, slicing.margin, slicing.margin))[None])[0]
    assert np.array_equal(stacked, neighbours_of(image, count, axis))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("patch_size", [(1, 6, 6), (6, 1, 6), (4, 4, 4), (20, 24, 28)])
def test_a_training_patch_sees_the_neighbours_that_the_volume_has(axis, patch_size):
    volume = case("a", (20, 24, 28))
    slicing = Slicing(3, axis)
    config = TrainingConfig(patch_size=patch_size, batch_size=4, steps_per_epoch=6, augmentation="none")
    plain = list(PatchSampler([volume], config, seed=3).epoch(0))
    stacked = list(PatchSampler([volume], config, seed=3, slicing=slicing).epoch(0))
    whole = neighbours_of(volume.image, 3, axis)
    for one, other in zip(plain, stacked, strict=True):
        assert torch.equal(one.label, other.label)
        assert torch.equal(one.image[:, 0], other.image[:, 1])
        for patch in other.image.numpy():
            start = np.unravel_index(int(patch[1].flat[0]), volume.image.shape[1:])
            box = tuple(slice(at, at + length) for at, length in zip(start, patch_size, strict=True))
            assert np.array_equal(patch, whole[(slice(None), *box)])


def test_a_patch_larger_than_the_volume_gets_air_around_it_and_repeats_its_own_ends():
    volume = case("a", (3, 4, 4), fill=7.0)
    volume.image[0, 0, 0, 0] = 1.0  # air
    config = TrainingConfig(patch_size=(5, 4, 4), batch_size=1, augmentation="none")
    (batch,) = PatchSampler([volume], config, seed=0, slicing=Slicing(3, 0)).epoch(0)
    before, middle, behind = batch.image[0]
    assert torch.equal(before[1:], middle[:-1])
    assert torch.equal(behind[:-1], middle[1:])
    assert torch.equal(before[0], middle[0])
    assert torch.equal(behind[-1], middle[-1])


@pytest.mark.parametrize("augmentation", ["light", "strong"])
def test_augmentation_changes_a_slice_and_its_neighbours_together(augmentation):
    volume = case("a", (20, 24, 28))
    config = TrainingConfig(patch_size=(6, 8, 8), batch_size=2, steps_per_epoch=4, augmentation=augmentation)
    for batch in PatchSampler([volume], config, seed=1, slicing=Slicing(3, 2)).epoch(0):
        before, middle, behind = batch.image.unbind(1)
        assert torch.equal(before[..., 1:], middle[..., :-1])
        assert torch.equal(behind[..., :-1], middle[..., 1:])
        assert batch.label.shape == (2, 1, 6, 8, 8)


class Sum(nn.Module):
    """Adds its channels up, weighted so that their order matters; notes what it is shown."""

    def __init__(self, slice_axis=None):
        super().__init__()
        self.slice_axis = slice_axis
        self.seen = []

    def forward(self, x_BCDHW):
        self.seen.append(tuple(x_BCDHW.shape))
        weights = torch.arange(1.0, 1 + x_BCDHW.shape[1]).view(-1, 1, 1, 1)
        return (x_BCDHW * weights).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize("patch_size", [(4, 6, 6), (1, 5, 4), (12, 12, 12)])
def test_inference_sees_the_same_neighbours(axis, sliced, patch_size):
    image = np.random.default_rng(1).normal(size=(2, 9, 10, 11)).astype(np.float32)
    model = Sum(axis if sliced else None)
    found = predict_logits(model, image, patch_size, slicing=Slicing(3, axis))
    inside = tuple(
        slice((max(n, p) - n) // 2, (max(n, p) - n) // 2 + n) for n, p in zip((9, 10, 11), patch_size, strict=True)
    )
    grown = np.broadcast_to(image.min(axis=(1, 2, 3), keepdims=True), (2, *np.maximum((9, 10, 11), patch_size))).copy()
    grown[(slice(None), *inside)] = image
    wanted = (neighbours_of(grown, 3, axis) * np.arange(1, 7).reshape(-1, 1, 1, 1)).sum(0)[inside]
    torch.testing.assert_close(found[0], torch.from_numpy(wanted.astype(np.float32)), rtol=1e-4, atol=1e-4)


def test_a_network_of_images_gets_many_slices_at_once_and_none_twice():
    model = Sum(slice_axis=1)
    predict_logits(model, np.zeros((1, 16, 40, 16), np.float32), (16, 1, 16))
    assert model.seen == [(1, 1, 16, 40, 16)]


def test_more_slices_than_fit_take_several_passes(monkeypatch):
    monkeypatch.setattr("fedseg.inference.MAX_PIXELS_ON_CPU", 16 * 16 * 8)
    model = Sum(slice_axis=0)
    image = np.random.default_rng(0).normal(size=(1, 24, 16, 16)).astype(np.float32)
    found = predict_logits(model, image, (1, 16, 16))
    assert model.seen == [(1, 1, 8, 16, 16)] * 3
    torch.testing.assert_close(found, torch.from_numpy(image))


def test_the_coarsest_spacing_decides_the_axis_of_slices():
    assert experiment().slicing == Slicing(1, 0)
    assert experiment(data={"spacing": [1.0, 1.0, 3.0]}, training={"patch_size": [32, 32, 4]}).slicing.axis == 2
    assert experiment(data={"spacing": [1.0, 2.0, 2.0]}, training={"patch_size": [32, 4, 32]}).slicing.axis == 1
    chosen = experiment(
        data={"spacing": [1.0, 1.0, 3.0]}, model={"slice_axis": "H"}, training={"patch_size": [32, 1, 32]}
    )
    assert chosen.slicing.axis == 1
    assert new_model(chosen).slice_axis == 1


def test_a_network_gets_a_channel_per_neighbour():
    study = experiment(model={"slices": 3})
    assert study.in_channels == 3
    image = torch.zeros(1, 3, 4, 32, 32)
    assert new_model(study).eval()(image).shape == (1, 2, 4, 32, 32)
    volumes = experiment(model={"name": "unet", "slices": 3}, training={"patch_size": [16, 16, 16]})
    assert new_model(volumes).eval()(torch.zeros(1, 3, 16, 16, 16)).shape == (1, 2, 16, 16, 16)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"slices": 2}, "model.slices: must be odd"),
        ({"slices": 0}, "model.slices"),
        ({"slice_axis": "Z"}, "model.slice_axis"),
        ({"options": {"slice_axis": "H"}}, "slice_axis is a setting of \\[model\\]"),
    ],
)
def test_wrong_slices_are_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        experiment(model=model)


def test_slices_too_small_to_have_statistics_are_refused():
    with pytest.raises(ConfigError, match="shrinks to a single"):
        experiment(training={"patch_size": [1, 16, 16], "batch_size": 1})
    with pytest.raises(ConfigError, match="shrinks to a single"):
        experiment(model={"options": {"norm": "instance"}}, training={"patch_size": [4, 16, 16]})
