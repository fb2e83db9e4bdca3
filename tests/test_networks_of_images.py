"""RWKV-UNet in a federation, from the scenario to a segmented file: slices and their neighbours, FedBN, a warm start."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedseg.cli import app
from fedseg.data.volume import read_image, read_label
from fedseg.errors import StoreError
from fedseg.federated.exchange import take_weights
from fedseg.model_file import load_model_file
from fedseg.report.tables import comparison_table, load_result
from fedseg.scenario import load_scenario
from fedseg.simulation import Machine, simulate
from tests.test_simulation import fedseg

SMALL = "options = { depths = [1, 1, 1, 2], widths = [6, 8, 12, 16], stem_width = 4, kernel = 3, decoder_kernel = 3 }"
SCENARIO = """
baselines = []

[experiment]
name = "%s"
task = { name = "phantom", modality = "mr", labels = { background = 0, liver = 1, spleen = 2, kidneys = 3 } }
data = { spacing = [2.0, 2.0, 3.0], validation_fraction = 0.34 }
training = { patch_size = %s, batch_size = 2, steps_per_epoch = 2, learning_rate = 0.01 }
federation = { rounds = 2 }
evaluation = { overlap = 0.0 }
%s

[methods.federated]
%s

[[sites]]
name = "Aare"
phantom = { cases = 4, shape = [24, 32, 24] }
[[sites]]
name = "Elbe"
phantom = { cases = 3, shape = [24, 32, 24], scanner = { gamma = 0.7 } }
"""


def scenario(name, model, methods="", patch_size=(32, 32, 2)):
    return SCENARIO % (name, list(patch_size), f"[experiment.model]\n{model}", methods)


def run(folder, name, *settings):
    path = folder / f"{name}.toml"
    path.write_text(scenario(name, *settings))
    return simulate(load_scenario(path), folder / name, Machine())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("slices")


@pytest.fixture(scope="module")
def sliced(folder):
    """A result directory of a network that sees each slice and its neighbours along the coarsest axis."""
    model = f'name = "rwkv-unet"\nslices = 3\n{SMALL}'
    run(folder, "sliced", model, '[methods.fedbn]\nexchange = "all-but-norms"')
    return folder / "sliced"


def test_a_federation_trains_it_and_scores_volumes(sliced):
    result = load_result(sliced)
    assert set(result["headline"]) == {"federated", "fedbn"}
    assert set(result["final"]["federated"]["labels"]) == {"liver", "spleen", "kidneys"}
    assert result["traffic"]["fedbn"]["megabytes_up"] < result["traffic"]["federated"]["megabytes_up"]
    experiment, network = load_model_file(sliced)
    assert network.slice_axis == 2
    assert experiment.in_channels == 3


def test_its_prediction_lies_on_the_grid_of_the_image(sliced, tmp_path):
    image = _first_image(sliced / "data" / "Aare")
    fedseg("predict", sliced, image, tmp_path / "label.nii.gz", "--device", "cpu")
    label = read_label(tmp_path / "label.nii.gz")
    assert label.geometry.shape == read_image((image,)).geometry.shape


def _first_image(folder):
    return sorted(path for path in folder.rglob("*.nii.gz") if "label" not in str(path.relative_to(folder)))[0]


def test_an_exported_graph_wants_the_neighbours_as_channels(sliced, tmp_path):
    done = CliRunner().invoke(app, ["export", str(sliced), str(tmp_path / "model.pt2")])
    assert done.exit_code == 0, done.output
    assert "3 channels" in done.output
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert program(torch.zeros(1, 3, 32, 32, 2)).shape == (1, 4, 32, 32, 2)


def test_the_next_study_starts_from_its_encoder(folder, sliced):
    model = f'name = "rwkv-unet"\nslices = 3\npretrained = "sliced/models/federated.safetensors"\n{SMALL}'
    path = folder / "warm.toml"
    path.write_text(scenario("warm", model))
    experiment = folder / "experiment.toml"
    wanted = load_scenario(path).experiment
    document = wanted.model_dump(mode="json", exclude_none=True)
    experiment.write_text(_toml(document))
    done = CliRunner().invoke(app, ["warm-start", str(experiment)])
    assert done.exit_code == 0, done.output
    assert "in the file not used" in done.output
    assert "loaded: stem.expand.weight" in done.output
    run(folder, "warm", model)
    first, second = (take_weights(load_model_file(folder / name)[1]) for name in ("sliced", "warm"))
    assert any((first[name] != second[name]).any() for name in first)


def _toml(document, prefix=""):
    """Enough TOML for an experiment."""
    plain = {key: value for key, value in document.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    lines = [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in plain.items()]
    for key, value in tables.items():
        lines += [f"[{prefix}{key}]", _toml(value, f"{prefix}{key}.")]
    return "\n".join(lines)


def test_two_networks_stand_in_one_table(folder, sliced):
    run(folder, "volumes", f'name = "rwkv-unet-3d"\n{SMALL}', "", (16, 32, 16))
    done = CliRunner().invoke(app, ["results", str(sliced), str(folder / "volumes")])
    assert done.exit_code == 0, done.output
    for word in ("sliced", "volumes", "rwkv-unet t", "rwkv-unet-3d t", "fedbn"):
        assert word in done.output


def test_studies_of_other_test_cases_are_not_put_in_one_table(sliced):
    result = load_result(sliced)
    other = {**result, "name": "other", "test": "somebody else's cases"}
    with pytest.raises(StoreError, match=r"other, seed 0, was scored on .* cases"):
        comparison_table([[result], [other]])


def test_the_same_seed_gives_the_same_network(folder, sliced):
    model = f'name = "rwkv-unet"\nslices = 3\n{SMALL}'
    run(folder, "again", model)
    one, two = (take_weights(load_model_file(folder / name)[1]) for name in ("sliced", "again"))
    assert all(np.array_equal(one[name], two[name]) for name in one)
