import torch
from hypothesis import given
from hypothesis import strategies as st

from fedseg.layers.padding import crop, margin_for, pad

sizes = st.tuples(*[st.integers(1, 9)] * 3)
steps = st.tuples(*[st.sampled_from([1, 2, 4, 5])] * 3)


@given(sizes, steps)
def test_padding_reaches_the_next_multiple_and_is_cropped_again(size, multiple):
    volume = torch.randn(1, 2, *size)
    margin = margin_for(size, multiple)
    padded = pad(volume, margin)
    for length, grown, step in zip(size, padded.shape[2:], multiple, strict=True):
        assert grown % step == 0
        assert 0 <= grown - length < step
    assert torch.equal(crop(padded, margin), volume)


@given(sizes, steps)
def test_the_volume_sits_in_the_middle(size, multiple):
    margin = margin_for(size, multiple)
    assert all(0 <= behind - front <= 1 for front, behind in zip(margin.before, margin.after, strict=True))


def test_padding_repeats_the_border():
    volume = torch.arange(3.0).view(1, 1, 1, 1, 3)
    padded = pad(volume, margin_for((1, 1, 3), (2, 1, 6)))
    assert padded.flatten().tolist() == [0, 0, 1, 2, 2, 2] * 2


def test_a_volume_that_fits_is_not_copied():
    volume = torch.randn(1, 1, 4, 4, 4)
    margin = margin_for((4, 4, 4), (2, 2, 2))
    assert pad(volume, margin) is volume
    assert crop(volume, margin, (2, 2, 2)) is volume


@given(sizes, st.sampled_from([(1, 2, 2), (2, 2, 2), (2, 4, 4)]))
def test_coarse_logits_lie_within_half_a_coarse_voxel_of_the_volume(size, stride):
    multiple = tuple(2 * step for step in stride)
    margin = margin_for(size, multiple)
    grown = [length + a + b for length, a, b in zip(size, margin.before, margin.after, strict=True)]
    coarse = [length // step for length, step in zip(grown, stride, strict=True)]
    where = torch.stack(torch.meshgrid(*[torch.arange(n) for n in coarse], indexing="ij"))[None].float()
    kept = crop(where, margin, stride)
    for axis in range(3):
        first, last = kept[0, axis].min().item() * stride[axis], (kept[0, axis].max().item() + 1) * stride[axis]
        start, end = margin.before[axis], margin.before[axis] + size[axis]
        assert abs(first - start) <= stride[axis] / 2 or kept.shape[2 + axis] == 1
        assert abs(last - end) <= stride[axis] or kept.shape[2 + axis] == 1
