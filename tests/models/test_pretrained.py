"""Warm start: what fits is loaded, and the report says what did not."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fedseg.config import load_experiment, parse_experiment
from fedseg.errors import ModelError
from fedseg.federated.exchange import take_weights
from fedseg.federated.networks import new_model, start_state
from fedseg.model_file import save_model_file
from fedseg.models import build_model
from fedseg.models.pretrained import load_pretrained
from fedseg.models.published import published_names, released_shape
from fedseg.scenario import load_scenario

SMALL = {"depths": [1, 1, 2, 2], "widths": [6, 8, 12, 16], "stem_width": 4}
OPTIONS = {"rwkv-unet": SMALL, "rwkv-unet-3d": SMALL, "unet": {"widths": [4, 6]}, "mlru++": {"base_width": 2}}


def build(name="rwkv-unet", seed=0, **changes):
    torch.manual_seed(seed)
    return build_model(name, num_labels=3, patch_size=(8, 32, 32), **{**OPTIONS.get(name, {}), **changes})


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def is_encoder(name):
    return name.startswith(("stem.", "stages."))


def released(model, *, prefix="", encoder_only=False):
    """A network's tensors as its authors would have stored them."""
    ours = model.state_dict()
    found = {}
    for name, theirs in published_names(model).items():
        if not encoder_only or theirs.startswith("encoder."):
            theirs_alone = theirs.removeprefix("encoder.") if encoder_only else theirs
            found[prefix + theirs_alone] = ours[name].reshape(released_shape(theirs, ours[name])).contiguous()
    return found


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_file_of_our_own_gives_the_encoder_and_leaves_the_rest_fresh(tmp_path, name):
    old, new = build(name, seed=1), build(name, seed=2)
    before = values(new)
    save_file(values(old), tmp_path / "old.safetensors")
    report = load_pretrained(new, name, tmp_path / "old.safetensors")
    loaded, after = set(report.loaded), values(new)
    assert loaded
    assert report.absent == report.misfits == ()
    assert set(report.unread) == before.keys() - loaded
    assert report.num_values == report.num_wanted == sum(after[key].numel() for key in loaded)
    for key, tensor in after.items():
        assert torch.equal(tensor, values(old)[key] if key in loaded else before[key])
    everything = load_pretrained(new, name, tmp_path / "old.safetensors", "all")
    assert everything.unread == ()
    assert all(torch.equal(tensor, values(old)[key]) for key, tensor in values(new).items())


@pytest.mark.parametrize(("prefix", "encoder_only"), [("", False), ("module.", False), ("", True), ("module.", True)])
def test_released_names_are_understood(tmp_path, prefix, encoder_only):
    old, new = build(seed=1), build(seed=2)
    tensors = {**released(old, prefix=prefix, encoder_only=encoder_only), "head.weight": torch.zeros(1000, 2)}
    save_file(tensors, tmp_path / "encoder.safetensors")
    report = load_pretrained(new, "rwkv-unet", tmp_path / "encoder.safetensors")
    assert set(report.loaded) == {name for name in values(new) if is_encoder(name)}
    assert "head.weight" in report.unread
    assert all(torch.equal(tensor, values(old)[key]) for key, tensor in values(new).items() if is_encoder(key))


def test_an_encoder_of_other_channels_is_loaded_but_for_its_stem(tmp_path):
    old, new = build(seed=1), build(seed=2, in_channels=5)
    save_file(values(old), tmp_path / "old.safetensors")
    report = load_pretrained(new, "rwkv-unet", tmp_path / "old.safetensors")
    assert all(name.startswith("stages.") for name in report.loaded)
    assert "stem.expand.weight is (3, 3, 1, 1), not (5, 5, 1, 1)" in report.misfits
    assert f"{len(report.misfits)} of another shape" in str(report)


def test_what_is_missing_is_told(tmp_path):
    old, new = build(seed=1), build(seed=2)
    kept = {name: tensor for name, tensor in values(old).items() if not name.startswith("stages.3.")}
    save_file(kept, tmp_path / "old.safetensors")
    report = load_pretrained(new, "rwkv-unet", tmp_path / "old.safetensors")
    assert report.absent == tuple(sorted(name for name in values(new) if name.startswith("stages.3.")))
    assert report.num_values < report.num_wanted


def test_a_file_of_something_else_is_refused_and_changes_nothing(tmp_path):
    new = build()
    before = values(new)
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"other\.safetensors: none of its 1 tensors .* it has conv1\.weight"):
        load_pretrained(new, "rwkv-unet", tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(ModelError, match=r"text\.safetensors: not a readable safetensors file"):
        load_pretrained(new, "rwkv-unet", tmp_path / "text.safetensors")
    with pytest.raises(ModelError, match=r"none\.safetensors: no such file"):
        load_pretrained(new, "rwkv-unet", tmp_path / "none.safetensors")
    assert all(torch.equal(tensor, before[key]) for key, tensor in values(new).items())


def document(**model):
    return {
        "name": "warm",
        "task": {"name": "toy", "modality": "mr", "labels": {"background": 0, "liver": 1}},
        "training": {"patch_size": [4, 32, 32]},
        "model": {"name": "rwkv-unet", "options": SMALL, **model},
        "federation": {"rounds": 1},
    }


TOML = """
name = "warm"
[task]
name = "toy"
modality = "mr"
labels = { background = 0, liver = 1 }
[training]
patch_size = [4, 32, 32]
[model]
name = "rwkv-unet"
options = { depths = [1, 1, 2, 2], widths = [6, 8, 12, 16], stem_width = 4 }
pretrained = "weights/old.safetensors"
[federation]
rounds = 1
"""


def test_a_federation_starts_from_the_file_beside_its_experiment(tmp_path):
    plain = parse_experiment(json.dumps(document()))
    torch.manual_seed(9)
    old = take_weights(new_model(plain))
    save_model_file(tmp_path / "study" / "weights" / "old.safetensors", plain, old, "test")
    (tmp_path / "study" / "warm.toml").write_text(TOML)
    (tmp_path / "scenario.toml").write_text(
        'experiment = "study/warm.toml"\n[[sites]]\nname = "A"\ndata = "here"\n[[sites]]\nname = "B"\ndata = "there"\n'
    )
    fresh = start_state(plain).weights
    for experiment in (
        load_experiment(tmp_path / "study" / "warm.toml"),
        load_scenario(tmp_path / "scenario.toml").experiment,
    ):
        weights = start_state(experiment).weights
        for name, array in weights.items():
            assert (array == (old if is_encoder(name) else fresh)[name]).all()
        assert json.loads(experiment.to_json())["model"]["pretrained"] == "old.safetensors"
        assert str(tmp_path) not in experiment.to_json()
