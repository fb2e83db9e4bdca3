"""One tiny simulation, run once, and what it must leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from fedseg.cli import app
from fedseg.data.volume import read_image, read_label
from fedseg.errors import StoreError
from fedseg.federated.store import RunStore
from fedseg.report.tables import load_result
from fedseg.scenario import load_scenario
from fedseg.scores import read_scores
from fedseg.simulation import Machine, discard, simulate

SCENARIO = """
baselines = ["pooled", "local"]

[experiment]
name = "tiny"
task = { name = "phantom", modality = "mr", labels = { background = 0, liver = 1, spleen = 2, kidneys = 3 } }
data = { validation_fraction = 0.34 }
model = { name = "unet", options = { widths = [4, 8] } }
training = { patch_size = [16, 16, 16], steps_per_epoch = 2, learning_rate = 0.01 }
federation = { rounds = 3 }

[methods.federated]
[methods.prox]
proximal_mu = 0.1

[[sites]]
name = "Aare"
phantom = { cases = 4, shape = [16, 16, 16] }
[[sites]]
name = "Elbe"
phantom = { cases = 3, shape = [16, 20, 16], scanner = { gamma = 0.7 } }
"""
RUNS = ("federated", "prox", "pooled", "local-Aare", "local-Elbe")


@pytest.fixture(scope="module")
def scenario(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenario") / "tiny.toml"
    path.write_text(SCENARIO)
    return path


@pytest.fixture(scope="module")
def finished(scenario, tmp_path_factory):
    """The result directory of `fedseg simulate` with two workers."""
    output = tmp_path_factory.mktemp("run") / "out"
    done = fedseg("simulate", scenario, "--output", output, "--workers", "2")
    assert "Rounds" not in done.stdout  # a live table is for terminals only
    assert "federated: round 3/3: 2 of 2 sites" in done.stdout
    return output


def fedseg(*arguments, expect=0):
    command = [sys.executable, "-c", "from fedseg.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def digests(output, run):
    store = RunStore(output, run)
    try:
        return store.rows("SELECT server_round, weights_sha256 FROM rounds WHERE run = ? ORDER BY server_round", run)
    finally:
        store.close()


def test_the_result_holds_every_method_site_and_label(finished):
    result = load_result(finished)
    assert set(result["final"]) == {"federated", "prox", "pooled", "local"}
    for final in result["final"].values():
        assert set(final["sites"]) == {"Aare", "Elbe"}
        assert set(final["labels"]) == {"liver", "spleen", "kidneys"}
        assert final["dice_mean"] == pytest.approx(np.mean(list(final["sites"].values())))
        assert final["dice_worst_site"] == final["sites"][final["worst_site"]] == min(final["sites"].values())
    assert result["sites"]["Aare"]["training_cases"] == 3
    assert result["traffic"]["federated"]["updates"] == 6


def test_the_headline_is_worked_out_from_the_sites(finished):
    result = load_result(finished)
    fed, pooled, local = (result["final"][name]["sites"] for name in ("prox", "pooled", "local"))
    headline = result["headline"]["prox"]
    assert headline["R"] == pytest.approx(sum(fed.values()) / sum(pooled.values()))
    assert headline["W"] == pytest.approx(100 * max(pooled[site] - fed[site] for site in fed))
    assert headline["G"] == pytest.approx(100 * min(fed[site] - local[site] for site in fed))


def test_scores_of_each_case_are_kept_and_local_models_are_scored_at_home(finished):
    rows = read_scores(finished / "scores.csv")
    assert {row.run for row in rows} == set(RUNS)
    assert {row.site for row in rows if row.run == "local-Elbe"} == {"Elbe"}
    assert {row.site for row in rows if row.run == "federated"} == {"Aare", "Elbe"}
    assert all(0 <= row.dice <= 1 and row.volume_reference > 0 for row in rows)


def test_checkpoints_models_and_pictures_are_there(finished):
    assert list((finished / "checkpoints").glob("federated-round-0003.safetensors"))
    assert {path.stem for path in (finished / "models").iterdir()} == set(RUNS)
    for name in ("curves.png", "sites.png", "segmentations.png"):
        assert (finished / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_bit(finished, scenario, tmp_path, workers):
    simulate(load_scenario(scenario), tmp_path / "out", Machine(workers=workers))
    for run in RUNS:
        assert digests(tmp_path / "out", run) == digests(finished, run)
    assert load_result(tmp_path / "out")["final"] == load_result(finished)["final"]


def test_pooled_training_takes_as_many_steps_as_all_sites_together(finished):
    store = RunStore(finished, "pooled")
    try:
        steps = [
            json.loads(row["training"])["steps"]
            for row in store.rows("SELECT training FROM updates WHERE run = 'pooled'")
        ]
    finally:
        store.close()
    assert steps == [4.0, 4.0, 4.0]


def test_an_interrupted_simulation_goes_on_to_the_same_result(finished, scenario, tmp_path):
    """The whole command is killed when the second of its five runs has begun, and resumed."""
    output = tmp_path / "out"
    command = [sys.executable, "-c", "from fedseg.cli import main; main()", "simulate", scenario, "--output", output]
    process = subprocess.Popen(
        [*map(str, command), "--workers", "1"], stdout=subprocess.DEVNULL, start_new_session=True
    )
    end = time.monotonic() + 120
    try:
        while not list((output / "checkpoints").glob("prox-round-*")):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (output / "result.json").exists()
    fedseg("simulate", scenario, "--output", output, expect=2)  # without --resume nothing is touched
    fedseg("simulate", scenario, "--output", output, "--resume", "--workers", "2")
    assert load_result(output)["final"] == load_result(finished)["final"]


def test_results_are_not_overwritten_by_accident(finished, scenario, tmp_path):
    with pytest.raises(StoreError, match="add --resume to go on, --overwrite to discard"):
        simulate(load_scenario(scenario), finished, Machine())
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="no result directory"):
        discard(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_results_of_several_seeds_become_a_mean_with_its_spread(finished):
    shown = CliRunner().invoke(app, ["results", str(finished), str(finished)]).stdout
    assert "± 0.000" in shown
    assert "local" in shown
    assert "pooled" in shown


def test_a_prediction_lies_on_its_images_grid(finished, tmp_path):
    """Whatever the image's orientation: here the first axis runs from right to left, and the slices come first."""
    source = next((finished / "data" / "Elbe" / "imagesTr").glob("*.nii.gz"))
    image = nib.load(source)
    turned = nib.as_closest_canonical(image).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("SLP"))
    )
    nib.save(turned, tmp_path / "turned.nii.gz")
    fedseg("predict", finished, source, tmp_path / "plain_label.nii.gz", "--device", "cpu")
    fedseg("predict", finished, tmp_path / "turned.nii.gz", tmp_path / "turned_label.nii.gz", "--device", "cpu")
    label = nib.load(tmp_path / "turned_label.nii.gz")
    assert label.shape == turned.shape
    np.testing.assert_allclose(label.affine, turned.affine)
    plain, again = (read_label(tmp_path / f"{name}_label.nii.gz").array for name in ("plain", "turned"))
    np.testing.assert_array_equal(plain, again)
    assert plain.shape == read_image((source,)).array.shape[1:]


def test_a_folder_is_segmented_although_one_image_is_broken(finished, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((finished / "data" / "Aare" / "imagesTr").glob("*.nii.gz"))[:2]:
        (images / path.name.replace(".nii.gz", "_0000.nii.gz")).write_bytes(path.read_bytes())
    (images / "broken_0000.nii.gz").write_bytes(b"no image")
    done = fedseg("predict", finished, images, tmp_path / "labels", "--device", "cpu", expect=1)
    assert "broken: not segmented (unreadable)" in done.stderr
    assert "2 of 3 labels written" in done.stdout
    assert len(list((tmp_path / "labels").glob("phantom_00?.nii.gz"))) == 2


def test_evaluate_scores_a_cohort_and_writes_each_case(finished, tmp_path):
    done = fedseg("evaluate", finished, finished / "data" / "Aare", "--csv", tmp_path / "scores.csv", "--device", "cpu")
    assert "4 cases of 4 persons" in done.stdout
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0].startswith("case,person,label,dice")
    assert len(lines) == 1 + 4 * 3


def test_train_alone_makes_a_model_that_evaluate_takes(scenario, finished, tmp_path):
    experiment = tmp_path / "experiment.toml"
    text = SCENARIO[SCENARIO.index("[experiment]") : SCENARIO.index("[methods.federated]")].replace(
        "[experiment]\n", ""
    )
    experiment.write_text(text)
    folders = [finished / "data" / name for name in ("Aare", "Elbe")]
    fedseg("train", experiment, "--data", folders[0], "--output", tmp_path / "one", "--device", "cpu", "--threads", 1)
    both = [part for folder in folders for part in ("--data", folder)]
    fedseg("train", experiment, *both, "--output", tmp_path / "two", "--device", "cpu", "--threads", 1)
    assert len(digests(tmp_path / "one", "train")) == 4
    assert digests(tmp_path / "one", "train")[-1] != digests(tmp_path / "two", "train")[-1]
    fedseg("evaluate", tmp_path / "one" / "models" / "train.safetensors", folders[0], "--device", "cpu")
    refused = fedseg("train", experiment, expect=2)
    assert "needs cases: --data FOLDER" in refused.stderr


def test_a_missing_model_is_explained(tmp_path):
    done = fedseg("predict", tmp_path / "nothing.safetensors", tmp_path / "x.nii.gz", tmp_path / "y.nii.gz", expect=2)
    assert "no such model file" in done.stderr
    (tmp_path / "wrong.safetensors").write_bytes(Path(__file__).read_bytes())
    done = fedseg("evaluate", tmp_path / "wrong.safetensors", tmp_path, expect=2)
    assert "not a fedseg model file" in done.stderr
