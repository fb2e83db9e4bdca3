"""One tiny simulation, run once, and what it must leave behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from fedseg import logs
from fedseg.case_rows import read_scores
from fedseg.cli import app
from fedseg.cli.personalise import personalise
from fedseg.data.volume import read_image, read_label
from fedseg.errors import ConfigError, FedsegError, ModelError, StoreError
from fedseg.federated.exchange import take_weights
from fedseg.federated.networks import private_of
from fedseg.federated.store import RunStore
from fedseg.layout import Layout
from fedseg.model_file import load_model_file, read_model_file
from fedseg.report.figures import draw_figures
from fedseg.report.tables import load_result
from fedseg.scenario import load_scenario
from fedseg.scores import score_model
from fedseg.simulation import Machine, discard, simulate
from tests.federated.toys import same

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
    """The command, in this process: a new one would spend most of its time on importing torch."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    code, told = done.exit_code, done.output
    if isinstance(done.exception, FedsegError):  # what `main` makes of it
        code, told = 2, f"{told}error: {done.exception}"
    assert code == expect, told
    return Done(told)


@dataclass(frozen=True)
class Done:
    """What a command has printed."""

    stdout: str

    @property
    def stderr(self):
        return self.stdout


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
    assert {path.stem for path in (finished / "models").glob("*.safetensors")} == set(RUNS)
    for name in ("curves.png", "sites.png", "segmentations.png"):
        assert (finished / name).read_bytes()[:4] == b"\x89PNG"


def test_the_number_of_workers_changes_no_bit(finished, scenario, tmp_path):
    simulate(load_scenario(scenario), tmp_path / "out", Machine(workers=1))
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


def test_a_method_is_added_and_only_it_is_trained_and_scored(finished, scenario, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    more = tmp_path / "tiny.toml"
    more.write_text(
        scenario.read_text().replace("[methods.prox]", "[methods.uniform]\nweighting = 'uniform'\n[methods.prox]")
    )
    before = {path.name: path.stat().st_mtime_ns for path in (output / "scored").iterdir()}
    assert {name.rpartition("-")[0] for name in before} == set(RUNS)
    fedseg("simulate", more, "--output", output, "--resume", "--workers", "1", "--no-report")
    after = {path.name: path.stat().st_mtime_ns for path in (output / "scored").iterdir()}
    assert {name: after[name] for name in before} == before
    assert {name.rpartition("-")[0] for name in set(after) - set(before)} == {"uniform"}
    result = load_result(output)["final"]
    assert {name: result[name] for name in load_result(finished)["final"]} == load_result(finished)["final"]
    assert set(result) == {"federated", "uniform", "prox", "pooled", "local"}


@dataclass(frozen=True)
class Terminated:
    """What a process has left."""

    exit_code: int
    printed: str
    logged: str
    group_lives: bool


@pytest.fixture(scope="module")
def terminated(scenario, tmp_path_factory):
    """The command on two workers, logging JSON; told to end when its first run has two rounds."""
    folder = tmp_path_factory.mktemp("terminated")
    command = [sys.executable, "-m", "fedseg", "simulate", scenario, "--output", folder / "out", "--workers", "2"]
    with (folder / "printed").open("wb") as printed, (folder / "logged").open("wb") as logged:
        process = subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | {logs.FORMAT: "json"},
            stdout=printed,
            stderr=logged,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 200
        while not list((folder / "out" / "checkpoints").glob("federated-round-0002*")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        process.terminate()
        code = process.wait(60)
        end = time.monotonic() + 60
        while _group_lives(process.pid) and time.monotonic() < end:
            time.sleep(0.1)
        lives = _group_lives(process.pid)
    finally:
        if _group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Terminated(code, (folder / "printed").read_text(), (folder / "logged").read_text(), lives)


def test_a_terminated_simulation_leaves_no_process_behind(terminated):
    assert terminated.exit_code == 143
    assert not terminated.group_lives


def test_a_simulation_on_workers_logs_json_and_nothing_else(terminated):
    lines = [json.loads(line) for line in terminated.logged.splitlines()]
    answers = {(line["run"], line["round"], line["site"]) for line in lines if "accepted" in line["message"]}
    assert answers >= {("federated", number, site) for number in (1, 2) for site in ("Aare", "Elbe")}
    assert "{" not in terminated.printed


def _group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


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


def test_a_prediction_takes_as_many_threads_as_the_environment_says(finished, tmp_path, monkeypatch):
    source, before = next((finished / "data" / "Elbe" / "imagesTr").glob("*.nii.gz")), torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(before + 2))
    try:
        fedseg("predict", finished, source, tmp_path / "label.nii.gz", "--device", "cpu")
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


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


# ------------------------------------------------------------------------------------------------ private tensors
PRIVATE_SCENARIO = (
    SCENARIO.replace("widths = [4, 8]", 'widths = [4, 8], norm = "batch"')
    .replace("rounds = 3", "rounds = 2")
    .replace('baselines = ["pooled", "local"]', 'baselines = ["pooled"]')
    .replace("[methods.prox]\nproximal_mu = 0.1", '[methods.encoders]\nexchange = "decoder"')
    .replace("[methods.federated]", '[methods.fedbn]\nexchange = "all-but-norms"\n[methods.federated]')
)
SITES = ("Aare", "Elbe")


@pytest.fixture(scope="module")
def private_scenario(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenario") / "private.toml"
    path.write_text(PRIVATE_SCENARIO)
    return load_scenario(path)


@pytest.fixture(scope="module")
def with_private(private_scenario, tmp_path_factory):
    """The result directory of a simulation in which norms stay, encoders stay, and nothing stays."""
    output = tmp_path_factory.mktemp("private") / "out"
    simulate(private_scenario, output, Machine())
    return output


@pytest.mark.parametrize("method", ["fedbn", "encoders"])
def test_each_site_gets_a_model_that_differs_from_the_others_in_private_tensors_only(
    private_scenario, with_private, method
):
    private = private_of(private_scenario.experiment_of(method))
    server = read_model_file(with_private / "models" / f"{method}.safetensors")
    assert set(server.missing) == private
    aare, elbe = (load_model_file(with_private / "models" / method / f"{site}.safetensors")[1] for site in SITES)
    aare, elbe = take_weights(aare), take_weights(elbe)
    assert {name for name in aare if not np.array_equal(aare[name], elbe[name])} == private
    assert all(np.array_equal(aare[name], server.weights[name]) for name in aare.keys() - private)


def test_a_method_that_exchanges_everything_has_one_complete_model(with_private):
    assert not (with_private / "models" / "federated").exists()
    assert not list((with_private / "private" / "federated").glob("*"))
    assert read_model_file(with_private / "models" / "federated.safetensors").missing == ()
    assert read_model_file(with_private / "models" / "pooled.safetensors").missing == ()


def test_each_site_is_scored_with_its_own_model(private_scenario, with_private):
    rows = read_scores(with_private / "scores.csv")
    layout = Layout.model_validate_json((with_private / "layout.json").read_text())
    for site in layout.sites:
        path = with_private / "models" / "fedbn" / f"{site.name}.safetensors"
        expected = score_model(path, "fedbn", private_scenario.experiment, layout, [site.name])
        assert [row.dice for row in rows if (row.run, row.site) == ("fedbn", site.name)] == [
            row.dice for row in expected
        ]
    result = load_result(with_private)
    assert set(result["final"]) == {"fedbn", "federated", "encoders", "pooled"}
    assert all(set(final["sites"]) == set(SITES) for final in result["final"].values())


def test_the_traffic_shows_what_stayed_at_home(private_scenario, with_private):
    traffic = {method: load_result(with_private)["traffic"][method] for method in private_scenario.methods}
    assert {method["updates"] for method in traffic.values()} == {4}
    weights = read_model_file(with_private / "models" / "fedbn.safetensors").weights
    for method in traffic:
        private = private_of(private_scenario.experiment_of(method))
        sent = sum(array.nbytes for name, array in weights.items() if name not in private)
        assert traffic[method]["megabytes_up"] == pytest.approx(4 * sent / 1e6)
    assert traffic["encoders"]["megabytes_up"] < traffic["fedbn"]["megabytes_up"] < traffic["federated"]["megabytes_up"]


def test_pictures_are_drawn_of_sites_that_have_models_of_their_own(with_private):
    assert len(draw_figures(with_private)) == 3


def test_workers_and_resuming_change_no_bit_where_tensors_stay_at_the_sites(private_scenario, with_private, tmp_path):
    def stop(run, event):
        if (run, event.kind, event.server_round) == ("fedbn", "finished-round", 1):
            raise KeyboardInterrupt

    class Stopping:
        event = staticmethod(stop)
        progress = staticmethod(lambda task, done, total: None)

    with pytest.raises(KeyboardInterrupt):
        simulate(private_scenario, tmp_path, Machine(workers=2), show=Stopping())
    simulate(private_scenario, tmp_path, Machine(workers=2), resume=True)
    for run in (*private_scenario.methods, "pooled"):
        assert digests(tmp_path, run) == digests(with_private, run)
    assert load_result(tmp_path)["final"] == load_result(with_private)["final"]
    for path in sorted((with_private / "models").rglob("*.safetensors")):
        assert same(read_model_file(path).weights, read_model_file(tmp_path / path.relative_to(with_private)).weights)


def test_an_incomplete_model_is_refused_with_the_way_to_complete_it(with_private, tmp_path):
    model = with_private / "models" / "fedbn.safetensors"
    done = fedseg("evaluate", model, with_private / "data" / "Aare", expect=2)
    assert "8 tensors stayed at the sites" in done.stderr
    assert f"fedseg personalise {model} --site SITE.toml" in done.stderr
    assert f"the simulated sites' own models are in {model.with_suffix('')}" in done.stderr
    refused = fedseg("predict", model, tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", expect=2)
    assert "fedseg personalise" in refused.stderr
    fedseg("evaluate", model.with_suffix("") / "Aare.safetensors", with_private / "data" / "Aare", "--device", "cpu")


def personalised(model, site, output):
    command = Typer()
    command.command()(personalise)
    return CliRunner().invoke(command, [str(model), "--site", str(site), "--output", str(output)])


def test_personalise_joins_a_model_with_what_stayed_at_the_site(with_private, tmp_path):
    model, file = with_private / "models" / "fedbn.safetensors", tmp_path / "site.toml"
    file.write_text(f'name = "Elbe"\ndata = "."\nstate = "{with_private / "private" / "fedbn"}"\n')
    done = personalised(model, file, tmp_path / "own.safetensors")
    assert done.exit_code == 0, done.exception
    assert "the network of Elbe" in done.stdout
    experiment, network = load_model_file(tmp_path / "own.safetensors")
    assert experiment.federation.exchange == "all-but-norms"
    assert same(take_weights(network), read_model_file(with_private / "models" / "fedbn" / "Elbe.safetensors").weights)


@pytest.mark.parametrize(
    ("run", "name", "folder", "message"),
    [
        ("fedbn", "Oder", "fedbn", "site 'Oder' has no tensors of tiny/fedbn in .*: either it has not trained"),
        ("fedbn", "Elbe", "encoders", "site 'Elbe' has no tensors of tiny/fedbn"),
        ("federated", "Elbe", "fedbn", "the model is complete"),
    ],
)
def test_personalise_says_why_there_is_nothing_to_join(with_private, tmp_path, run, name, folder, message):
    file = tmp_path / "site.toml"
    file.write_text(f'name = "{name}"\ndata = "."\nstate = "{with_private / "private" / folder}"\n')
    done = personalised(with_private / "models" / f"{run}.safetensors", file, tmp_path / "own.safetensors")
    with pytest.raises(ModelError, match=message):
        raise done.exception
    assert not (tmp_path / "own.safetensors").exists()


def test_a_method_that_would_keep_nothing_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "scenario.toml").write_text(SCENARIO.replace("proximal_mu = 0.1", 'exchange = "all-but-norms"'))
    with pytest.raises(ConfigError, match="no tensor of unet would stay at a site"):
        simulate(load_scenario(tmp_path / "scenario.toml"), tmp_path / "out", Machine())
    assert not (tmp_path / "out").exists()
