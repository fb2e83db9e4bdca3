import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedseg.errors import ConfigError
from fedseg.inference import evaluating, pad_to_patch, predict_label, predict_logits


def pointwise():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 4, 1), nn.ReLU(), nn.Conv3d(4, 3, 1)).eval()


def image(*size, seed=0):
    return np.random.default_rng(seed).normal(size=(2, *size)).astype(np.float32)


def whole(model, image_CDHW):
    with torch.no_grad():
        return model(torch.from_numpy(image_CDHW)[None])[0]


class Recorder(nn.Module):
    """Notes the shapes and values that it is shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, windows):
        self.seen.append(windows.clone())
        return torch.cat([windows, -windows], dim=1)


@settings(deadline=None, max_examples=20)
@given(
    st.tuples(*[st.integers(1, 14)] * 3), st.sampled_from([(6, 6, 6), (4, 8, 5)]), st.sampled_from([0, 0.25, 0.5, 0.7])
)
def test_windows_of_a_pointwise_network_add_up_to_the_whole_volume(size, patch_size, overlap):
    model, volume = pointwise(), image(*size)
    found = predict_logits(model, volume, patch_size, overlap=overlap)
    assert found.shape == (3, *size)
    torch.testing.assert_close(found, whole(model, volume), rtol=1e-4, atol=1e-5)


def test_a_volume_within_the_patch_takes_one_pass():
    model = Recorder()
    found = predict_logits(model, image(3, 6, 4), (6, 6, 6))
    assert [tuple(windows.shape) for windows in model.seen] == [(1, 2, 6, 6, 6)]
    assert found.shape == (4, 3, 6, 4)


def test_a_larger_volume_takes_overlapping_windows_of_the_patchs_size():
    model = Recorder()
    predict_logits(model, image(12, 6, 3), (6, 6, 6), overlap=0.5, batch_size=2)
    assert [tuple(windows.shape) for windows in model.seen] == [(2, 2, 6, 6, 6), (1, 2, 6, 6, 6)]


@pytest.mark.parametrize("length", [3, 12])
def test_padding_is_each_channels_smallest_value_as_in_training(length):
    model, volume = Recorder(), image(length, 6, 4) + np.array([5, -5], dtype=np.float32)[:, None, None, None]
    predict_logits(model, volume, (6, 6, 6))
    for windows in model.seen:
        for channel in range(2):
            assert (windows[0, channel, :, :, [0, 5]] == volume[channel].min()).all()


@given(st.tuples(*[st.integers(1, 7)] * 3))
def test_padding_can_be_cut_off_again(size):
    volume = torch.from_numpy(image(*size))[None]
    padded, inside = pad_to_patch(volume, (4, 3, 5))
    assert tuple(padded.shape[2:]) == tuple(max(pair) for pair in zip(size, (4, 3, 5), strict=True))
    assert torch.equal(padded[inside], volume)


def test_the_number_of_windows_per_pass_does_not_matter():
    torch.manual_seed(0)
    model = nn.Conv3d(2, 3, 3, padding=1)
    volume = image(9, 11, 8)
    one, four = (predict_logits(model, volume, (6, 6, 6), batch_size=size) for size in (1, 4))
    torch.testing.assert_close(one, four)


def test_mirroring_averages_over_the_eight_flips():
    torch.manual_seed(0)
    model, volume = nn.Conv3d(2, 3, 3, padding=1), image(6, 6, 6)
    flips = [axes for count in range(4) for axes in itertools.combinations((1, 2, 3), count)]
    views = [whole(model, np.flip(volume, axes).copy()).flip(axes) for axes in flips]
    assert len(views) == 8
    found = predict_logits(model, volume, (6, 6, 6), mirror=True)
    torch.testing.assert_close(found, torch.stack(views).mean(0))


def test_every_module_is_back_in_its_own_mode_afterwards():
    model = nn.Sequential(nn.Conv3d(2, 3, 1), nn.Dropout(), nn.BatchNorm3d(3)).train()
    model[2].eval()  # frozen statistics
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model[1].training
        raise RuntimeError
    assert [module.training for module in model.modules()] == [True, True, True, False]


def test_dropout_is_off():
    model = nn.Sequential(nn.Dropout(0.9), pointwise()).train()
    volume = image(4, 4, 4)
    assert torch.equal(predict_logits(model, volume, (4, 4, 4)), predict_logits(model, volume, (4, 4, 4)))


def test_of_several_outputs_the_first_counts():
    class Tuple(nn.Module):
        def forward(self, windows):
            return windows, windows * 2

    volume = image(4, 4, 4)
    assert np.array_equal(predict_logits(Tuple(), volume, (4, 4, 4)).numpy(), volume)


def test_reduced_precision_gives_single_precision_logits():
    model, volume = pointwise(), image(9, 6, 6)
    found = predict_logits(model, volume, (6, 6, 6), precision="bf16")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole(model, volume), rtol=0.05, atol=0.05)


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        predict_logits(pointwise(), image(4, 4, 4), (4, 4, 4), precision="fp16")


def test_the_label_is_the_largest_logit():
    model, volume = pointwise(), image(9, 5, 7)
    found = predict_label(model, volume, (6, 6, 6))
    assert found.dtype == np.uint8
    assert np.array_equal(found, whole(model, volume).argmax(0).numpy())


def test_logits_can_be_changed_in_place():
    predict_logits(pointwise(), image(4, 4, 4), (4, 4, 4)).mul_(2)
    predict_logits(pointwise(), image(9, 4, 4), (4, 4, 4)).mul_(2)
