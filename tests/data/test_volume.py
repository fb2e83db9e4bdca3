"""NIfTI files in and out: orientation, geometry, and everything that may be wrong with a file."""

import itertools

import nibabel as nib
import numpy as np
import pytest

from fedseg.data.reasons import Reason
from fedseg.data.volume import read_image, read_label, write_label
from fedseg.errors import CaseError
from tests.data.niftis import SHAPE, ball, noise, save

ORIENTATIONS = [
    "".join(sides)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for sides in itertools.product(*axes)
]  # fmt: skip


def affine_of(codes, zooms=(1.0, 2.0, 3.0), origin=(-10.0, 5.0, 30.0)):
    """An affine whose voxel axes point to the given sides."""
    matrix = np.zeros((4, 4))
    for axis, code in enumerate(codes):
        world, sign = next(
            (w, 1 - 2 * side) for w, sides in enumerate(("RL", "AP", "SI")) if (side := sides.find(code)) >= 0
        )
        matrix[world, axis] = sign * zooms[axis]
    matrix[:3, 3] = origin
    matrix[3, 3] = 1
    return matrix


def oblique(degrees=20.0):
    a, b = np.radians([degrees, degrees / 2])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ np.diag([0.9, 1.1, 4.0])
    affine[:3, 3] = [-40, 12, 7]
    return affine


def reason_of(call, *arguments):
    with pytest.raises(CaseError) as refused:
        call(*arguments)
    return refused.value.reason, str(refused.value)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_is_turned_and_turned_back(tmp_path, codes):
    data = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    path = save(tmp_path / "a.nii", data, affine_of(codes))
    volume = read_image((path,))
    order = [codes.find(next(c for c in codes if c in sides)) for sides in ("SI", "AP", "RL")]
    assert volume.array.shape[1:] == tuple(SHAPE[axis] for axis in order)
    assert volume.spacing == pytest.approx([(1.0, 2.0, 3.0)[axis] for axis in order])
    # D runs towards S, H towards A, W towards R.
    assert (np.diag(volume.affine[:3, [2, 1, 0]]) > 0).all()
    assert np.array_equal(volume.geometry.turn_back(volume.array[0]), data)
    # Each value lies in the scanner where it lay in the file.
    for index in ((0, 0, 0), (2, 3, 1), tuple(n - 1 for n in volume.array.shape[1:])):
        in_file = np.unravel_index(int(volume.array[0][index]), SHAPE)
        assert volume.affine @ [*index, 1] == pytest.approx(affine_of(codes) @ [*in_file, 1])


@pytest.mark.parametrize("target", ["RAS", "LPS", "ASR", "IRP"])
def test_any_frame_can_be_asked_for(tmp_path, target):
    data = noise()
    path = save(tmp_path / "a.nii", data, affine_of("PIL"))
    volume = read_image((path,), target)
    assert "".join(nib.aff2axcodes(volume.affine[:, [2, 1, 0, 3]])) == target
    assert np.array_equal(volume.geometry.turn_back(volume.array[0]), data)


@pytest.mark.parametrize("affine", [affine_of("LPS"), affine_of("ASL"), oblique(), oblique(40.0)], ids=str)
def test_a_label_is_written_where_the_image_lies(tmp_path, affine):
    image = save(tmp_path / "a.nii.gz", noise(), affine)
    volume = read_image((image,))
    label = np.zeros(volume.geometry.array_shape, dtype=np.uint8)
    label[1:4, 2:5, 3:6] = 2
    write_label(tmp_path / "out" / "a.nii.gz", label, volume.geometry)
    written = nib.load(tmp_path / "out" / "a.nii.gz")
    assert np.allclose(written.affine, nib.load(image).affine, atol=1e-5)
    assert np.allclose(written.get_qform(), affine, atol=1e-4)
    assert written.shape == SHAPE
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(read_label(tmp_path / "out" / "a.nii.gz").array, label)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.nii.gz"]


def test_many_labels_are_written_in_two_bytes(tmp_path):
    geometry = read_image((save(tmp_path / "a.nii", noise()),)).geometry
    label = np.full(geometry.array_shape, 300, dtype=np.uint16)
    write_label(tmp_path / "b.nii", label, geometry)
    assert (read_label(tmp_path / "b.nii").array == 300).all()


def test_a_label_of_another_size_is_not_written(tmp_path):
    geometry = read_image((save(tmp_path / "a.nii", noise()),)).geometry
    with pytest.raises(ValueError, match=r"label is \(1, 2, 3\), the image's grid is \(8, 10, 12\)"):
        write_label(tmp_path / "b.nii", np.zeros((1, 2, 3)), geometry)


def test_channels_come_from_files_or_from_a_fourth_axis(tmp_path):
    one, two = noise(1), noise(2)
    save(tmp_path / "both.nii.gz", np.stack([one, two], axis=-1))
    save(tmp_path / "one.nii.gz", one)
    save(tmp_path / "two.nii.gz", two)
    together = read_image((tmp_path / "both.nii.gz",))
    apart = read_image((tmp_path / "one.nii.gz", tmp_path / "two.nii.gz"))
    assert together.array.shape == (2, 8, 10, 12)
    assert together.array.dtype == np.float32
    assert np.array_equal(together.array, apart.array)


def test_axes_of_length_one_behind_the_third_do_no_harm(tmp_path):
    save(tmp_path / "a.nii", noise(shape=(*SHAPE, 1, 2)))
    assert read_image((tmp_path / "a.nii",)).array.shape == (2, 8, 10, 12)
    save(tmp_path / "l.nii", ball()[..., None])
    assert read_label(tmp_path / "l.nii").array.shape == (8, 10, 12)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_whole_numbers_of_any_type_are_labels(tmp_path, dtype):
    label = read_label(save(tmp_path / "a.nii", ball(value=3).astype(dtype))).array
    assert label.dtype == np.uint8
    assert sorted(np.unique(label)) == [0, 3]


def test_scaled_values_are_read_as_meant(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(0.5, -7)
    nib.save(image, tmp_path / "a.nii")
    assert read_image((tmp_path / "a.nii",)).array.max() == 23 * 0.5 - 7


@pytest.mark.parametrize("keep", [0, 1, 10, 400, 0.5, 0.95, -9, -1])
def test_a_gzip_that_is_cut_short_is_unreadable(tmp_path, keep):
    path = save(tmp_path / "a.nii.gz", noise())
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    reason, told = reason_of(read_image, (path,))
    assert reason == Reason.UNREADABLE
    assert str(path) in told


def test_no_flipped_bit_in_a_gzip_goes_unnoticed(tmp_path):
    path = save(tmp_path / "a.nii.gz", noise())
    raw = path.read_bytes()
    generator = np.random.default_rng(0)
    for place in [*generator.integers(30, len(raw) - 8, 40), len(raw) - 6]:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        assert reason_of(read_image, (path,))[0] == Reason.UNREADABLE


@pytest.mark.parametrize("content", [b"", b"not a nifti", bytes(range(1, 256)) * 9, b"\0" * 400])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_what_is_no_nifti_is_unreadable(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert reason_of(read_image, (tmp_path / name,))[0] == Reason.UNREADABLE


def test_a_plain_file_that_is_cut_short_is_unreadable(tmp_path):
    path = save(tmp_path / "a.nii", noise())
    path.write_bytes(path.read_bytes()[:-100])
    assert reason_of(read_image, (path,))[0] == Reason.UNREADABLE


def test_missing_files_are_told_apart(tmp_path):
    assert reason_of(read_image, ())[0] == Reason.MISSING_IMAGE
    assert reason_of(read_image, (tmp_path / "a.nii",)) == (Reason.MISSING_IMAGE, f"{tmp_path / 'a.nii'}: no such file")
    assert reason_of(read_label, None)[0] == Reason.MISSING_LABEL
    assert reason_of(read_label, tmp_path / "a.nii")[0] == Reason.MISSING_LABEL


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    data = noise()
    data[3, 2, 1] = value
    assert reason_of(read_image, (save(tmp_path / "a.nii", data),))[0] == Reason.NON_FINITE
    label = ball().astype(np.float32)
    label[0, 0, 0] = value
    assert reason_of(read_label, save(tmp_path / "l.nii", label))[0] == Reason.NON_FINITE


def test_a_constant_channel_is_refused(tmp_path):
    data = np.stack([noise(), np.full(SHAPE, 7, dtype=np.float32)], axis=-1)
    reason, told = reason_of(read_image, (save(tmp_path / "a.nii", data),))
    assert reason == Reason.CONSTANT_IMAGE
    assert "channel 1 is 7 everywhere" in told


def test_labels_that_are_no_whole_numbers_are_refused(tmp_path):
    soft = ball().astype(np.float32) * 0.5
    assert reason_of(read_label, save(tmp_path / "a.nii", soft))[0] == Reason.UNKNOWN_LABEL
    assert reason_of(read_label, save(tmp_path / "b.nii", -ball().astype(np.int16)))[0] == Reason.UNKNOWN_LABEL
    huge = ball().astype(np.int32) * 70000
    assert reason_of(read_label, save(tmp_path / "c.nii", huge))[0] == Reason.UNKNOWN_LABEL


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 8, 2)])
def test_a_label_that_is_not_3d_is_refused(tmp_path, shape):
    assert reason_of(read_label, save(tmp_path / "a.nii", np.ones(shape, np.uint8)))[0] == Reason.SHAPE_MISMATCH


def test_channels_must_lie_on_one_grid(tmp_path):
    a = save(tmp_path / "a.nii", noise())
    smaller = save(tmp_path / "b.nii", noise(shape=(12, 10, 7)))
    assert reason_of(read_image, (a, smaller))[0] == Reason.SHAPE_MISMATCH
    moved = np.eye(4)
    moved[2, 3] = 0.2
    reason, told = reason_of(read_image, (a, save(tmp_path / "c.nii", noise(), moved)))
    assert reason == Reason.AFFINE_MISMATCH
    assert "0.2 mm apart" in told
    moved[2, 3] = 0.05
    assert read_image((a, save(tmp_path / "d.nii", noise(), moved))).array.shape[0] == 2


def test_a_small_turn_shows_at_the_far_corner(tmp_path):
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(0.05), -np.sin(0.05)], [np.sin(0.05), np.cos(0.05)]]
    a, b = save(tmp_path / "a.nii", noise()), save(tmp_path / "b.nii", noise(), turned)
    assert reason_of(read_image, (a, b))[0] == Reason.AFFINE_MISMATCH


@pytest.mark.parametrize(
    ("diagonal", "told"),
    [((0.001, 0.001, 0.001), "plausible is 0.01 to 50"), ((1, 1, 80), "plausible is"), ((1, 0, 1), "plausible is")],
)
def test_absurd_spacing_is_refused(tmp_path, diagonal, told):
    image = nib.Nifti1Image(noise(), None)
    image.header["sform_code"] = 1
    for row, value in zip(("srow_x", "srow_y", "srow_z"), np.diag(diagonal), strict=True):
        image.header[row] = [*value, 0]
    nib.save(image, tmp_path / "a.nii")
    reason, text = reason_of(read_image, (tmp_path / "a.nii",))
    assert reason == Reason.ABSURD_SPACING
    assert told in text


def test_an_affine_that_is_no_frame_is_refused(tmp_path):
    for number, column in enumerate(([1, 0, 0, 0], [np.nan, 0, 0, 0])):
        image = nib.Nifti1Image(noise(), None)
        image.header["sform_code"] = 1
        for row, value in enumerate(("srow_x", "srow_y", "srow_z")):
            image.header[value] = [*np.eye(3)[row, :1], column[row], np.eye(3)[row, 2], 0]
        nib.save(image, tmp_path / f"{number}.nii")
        assert reason_of(read_image, (tmp_path / f"{number}.nii",))[0] == Reason.ABSURD_SPACING
