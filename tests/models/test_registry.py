import subprocess
import sys

import pytest

from fedseg.errors import ModelError
from fedseg.models import build_model, check_model, list_models
from fedseg.models.registry import ARCHITECTURES, Option


def check(name="mlru++", **changes):
    arguments = {
        "preset": None,
        "options": {},
        "in_channels": 1,
        "num_labels": 3,
        "patch_size": (40, 56, 40),
        "batch_size": 2,
        **changes,
    }
    check_model(name, **arguments)


@pytest.mark.parametrize("info", list_models(), ids=lambda info: f"{info.name}-{info.preset}")
def test_every_listed_network_can_be_trained_on_its_own_task(info):
    check(
        info.name,
        preset=info.preset,
        in_channels=info.in_channels,
        num_labels=info.num_labels,
        patch_size=info.patch_size,
    )


def test_every_preset_sets_known_options_to_values_that_fit():
    for name, architecture in ARCHITECTURES.items():
        for preset in architecture.presets.values():
            for key, value in preset.options.items():
                assert architecture.options[key].accepts(value), (name, key, value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "mlru"}, r"no network is called 'mlru'; did you mean 'mlru\+\+'\?"),
        ({"preset": "acdd"}, "mlru.. has no preset 'acdd'; did you mean 'acdc'"),
        ({"options": {"base_with": 8}}, "no option 'base_with'; did you mean 'base_width'"),
        ({"options": {"base_width": 1}}, "base_width must be a whole number from 2 to 512, got 1"),
        ({"options": {"base_width": True}}, "base_width must be a whole number"),
        ({"options": {"attn_dropout": 1.0}}, "attn_dropout must be a number from 0 to 0.99, got 1.0"),
        ({"options": {"fold": "1d"}}, "fold must be one of '2d', '3d', got '1d'"),
        ({"options": {"msd_kernels": [3, 4]}}, "msd_kernels must be 1 to 8 odd numbers from 1 to 15"),
        ({"options": {"stem": [2, 2]}}, "stem must be 3 whole numbers from 1 to 16"),
        ({"options": {"base_width": 10**9}}, "base_width must be a whole number from 2 to 512"),
        ({"options": {"depths": [10**9, 1]}}, "depths must be 2 to 6 whole numbers from 1 to 32"),
        ({"name": "unet", "options": {"widths": [10**9, 1]}}, "widths must be 2 to 6 whole numbers from 1 to 4096"),
        ({"name": "rwkv-unet", "options": {"stem_width": 10**9}}, "stem_width must be a whole number from 1 to 4096"),
        ({"patch_size": (10**6, 10**6, 10**6)}, r"has 6e\+18 values; there can be 1.07e\+09, and 2048 voxels"),
        ({"patch_size": (1, 1, 4096)}, "2048 voxels along an axis"),
        ({"batch_size": 10**9}, "a batch of 1000000000 patches of 40x56x40"),
        ({"in_channels": 10**9}, "with 1000000000 channels"),
        ({"in_channels": 0}, "at least one input channel, got 0"),
        ({"num_labels": 1}, "at least two labels"),
        ({"patch_size": (0, 8, 8)}, "a patch needs at least one voxel per axis"),
        ({"patch_size": (8, 8, 8)}, "shrinks to a single voxel .*; use a larger patch, at least 8x8x9$"),
        (
            {"preset": "acdc", "patch_size": (8, 32, 32), "batch_size": 1},
            "at least 9x32x32, or a batch of 2",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_with_what_would_be_right(changes, message):
    with pytest.raises(ModelError, match=message):
        check(**changes)


def test_the_smallest_patch_that_is_named_as_right_is_right():
    check(patch_size=(8, 8, 9))
    check(preset="acdc", patch_size=(9, 32, 32), batch_size=1)
    check(preset="acdc", patch_size=(8, 32, 32), batch_size=2)


def test_building_refuses_the_same_mistakes():
    with pytest.raises(ModelError, match="no option 'widths'"):
        build_model("mlru++", num_labels=3, widths=[4, 8])
    with pytest.raises(ModelError, match="at least two labels"):
        build_model("unet", num_labels=1)


def test_lists_from_a_configuration_file_are_as_good_as_tuples():
    option = Option("ints", least=1, length=(3, 3))
    assert option.accepts([1, 2, 3])
    assert option.accepts((1, 2, 3))
    assert not option.accepts([1, 2, 3.0])


def test_configurations_are_checked_without_torch():
    program = (
        "import sys, fedseg.models as m;"
        "m.check_model('mlru++', preset=None, options={}, in_channels=1, num_labels=2, patch_size=(9, 9, 9), batch_size=1);"
        "print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_number_in_the_options_of_a_network_is_unlimited(name):
    for key, option in ARCHITECTURES[name].options.items():
        if option.kind in ("int", "ints"):
            assert option.most <= 4096, key
