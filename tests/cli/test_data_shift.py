"""`fedseg data profiles`, `effects`, `shift` and `calibrate` as people type them."""

import csv
import json

import numpy as np
import pytest
from matplotlib import image as png
from typer.testing import CliRunner

from fedseg.cli import app
from fedseg.config import parse_experiment
from fedseg.data.shift.catalogue import EFFECTS, HABITS
from fedseg.errors import ConfigError, DataError
from fedseg.federated.networks import start_state
from fedseg.model_file import save_model_file
from tests.data.niftis import decathlon

STUDY = {
    "name": "balls",
    "task": {"name": "balls", "modality": "mr", "labels": {"background": 0, "ball": 1}},
    "model": {"name": "unet", "options": {"widths": [2, 4]}},
    "training": {"patch_size": [8, 8, 8]},
    "federation": {"rounds": 1},
}


def run(*arguments, code=0):
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(argument) for argument in arguments])
    if code is not None:
        assert result.exit_code == code, result.output
    return result


def test_all_profiles_effects_and_habits_are_listed():
    profiles = run("data", "profiles").output
    assert "low-field" in profiles
    assert "ct-metal" in profiles
    effects = run("data", "effects").output
    assert all(name in effects for name in (*EFFECTS, *HABITS))


def test_a_sheet_of_phantoms_has_a_column_for_every_severity(tmp_path):
    run("data", "shift", tmp_path / "sheet.png", "--effect", "noise", "--effect", "tight")
    sheet = png.imread(tmp_path / "sheet.png")[..., :3]
    columns = np.array_split(sheet, 6, axis=1)
    assert all(column.std() > 0.1 for column in columns)
    assert not any(np.allclose(columns[0][:, :90], column[:, :90], atol=0.05) for column in columns[1:])


def test_a_sheet_of_profiles_is_drawn_from_a_folder(tmp_path):
    decathlon(tmp_path / "data", ["a", "b"])
    (tmp_path / "ours.toml").write_text(
        'name = "ours"\nmodality = "mr"\neffects = [{ name = "coarser", severity = 2 }]\n'
    )
    profiles = ["--profile", "low-field", "--profile", tmp_path / "ours.toml"]
    run("data", "shift", tmp_path / "s.png", "--data", tmp_path / "data", *profiles)
    assert np.asarray(png.imread(tmp_path / "s.png")).std() > 0.05


def test_a_misspelt_effect_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'ghosting'"):
        raise run("data", "shift", tmp_path / "s.png", "--effect", "gosting", code=None).exception


def test_a_model_is_measured_under_every_severity(tmp_path):
    experiment = parse_experiment(json.dumps(STUDY))
    save_model_file(tmp_path / "model.safetensors", experiment, start_state(experiment).weights, "test")
    decathlon(tmp_path / "data", ["a", "b"])
    table = tmp_path / "table.csv"
    run("data", "calibrate", tmp_path / "model.safetensors", "--data", tmp_path / "data", "--device", "cpu",
        "--effect", "gain", "--effect", "tight", "--csv", table)  # fmt: skip
    rows = list(csv.DictReader(table.open()))
    assert [(row["name"], row["severity"]) for row in rows] == [
        ("clean", "0"),
        *[(name, str(severity)) for name in ("gain", "tight") for severity in range(1, 6)],
    ]
    assert [float(row["lost"]) for row in rows[1:6]] == pytest.approx([0] * 5, abs=0.5)
    tight = [float(row["lost"]) for row in rows[6:]]
    assert tight == sorted(tight)
    assert tight[-1] > 5
    run("data", "calibrate", tmp_path / "model.safetensors", "--data", tmp_path / "data", "--device", "cpu",
        "--profile", "3t-clean", "--csv", table)  # fmt: skip
    assert [row["name"] for row in csv.DictReader(table.open())] == ["clean", "3t-clean"]


def test_without_cases_a_file_of_a_model_is_not_enough(tmp_path):
    experiment = parse_experiment(json.dumps(STUDY))
    save_model_file(tmp_path / "model.safetensors", experiment, start_state(experiment).weights, "test")
    with pytest.raises(DataError, match="name the cases with --data"):
        raise run("data", "calibrate", tmp_path / "model.safetensors", code=None).exception
