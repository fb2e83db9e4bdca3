"""One tiny simulation, measured for real: all parts, with one worker; and with two, killed, and resumed."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fedseg.case_rows import read_scores
from fedseg.cli import app
from fedseg.data.cohort import read_cohort
from fedseg.data.phantom import PhantomConfig, write_phantoms
from fedseg.errors import ConfigError, StoreError
from fedseg.robustness.evaluation import Machine, Question, evaluate_model, evaluate_run
from fedseg.robustness.networks import Network, Row
from fedseg.robustness.store import RobustnessStore
from fedseg.scenario import load_scenario
from fedseg.simulation import Machine as Simulator
from fedseg.simulation import simulate

SCENARIO = """
baselines = ["pooled", "local", "leave-one-out"]
personal_epochs = 1
methods.fedavg = {{}}
methods.fedbn = {{ exchange = "all-but-norms" }}
hospitals.B.scanner = "thick-slices"
unseen.X.scanner = "low-field"

[experiment]
name = "tiny"
task = {{ name = "phantom", modality = "mr", labels = {{ background = 0, liver = 1, spleen = 2, kidneys = 3 }} }}
data = {{ validation_fraction = 0.34 }}
model = {{ name = "dynunet", options = {{ widths = [4, 8, 8], norm = "batch" }} }}
training = {{ patch_size = [16, 16, 16], steps_per_epoch = 1, learning_rate = 0.01 }}
federation = {{ rounds = 1 }}

[source]
data = "{data}"
test_fraction = 0.25
partition = {{ scheme = "sizes", sizes = [1, 1, 1] }}
"""
METHODS = ("fedavg", "fedbn", "fedavg-personal", "fedbn-personal")
GRID = Question(parts=("grid",), effects=("noise", "gain"), severities=(1, 5))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robustness")
    write_phantoms(folder / "data", PhantomConfig(cases=12, shape=(16, 16, 16)))
    (folder / "tiny.toml").write_text(SCENARIO.format(data=folder / "data"))
    simulate(load_scenario(folder / "tiny.toml"), folder / "run", Simulator())
    return folder / "run"


@pytest.fixture(scope="module")
def measured(simulated, tmp_path_factory):
    """A copy of the run, measured by the command with one worker."""
    run = tmp_path_factory.mktemp("measured") / "run"
    shutil.copytree(simulated, run)
    done = CliRunner().invoke(
        app, ["evaluate", "--robustness", str(run), "--effects", "noise,gain", "--severities", "1,5", "--workers", "1"]
    )
    assert done.exit_code == 0, done.output
    for told in ("Dice of networks", "Pairs, over persons", "Calibration", "Under 2 effects", "X (unseen)"):
        assert told in done.output
    return run


@pytest.fixture
def document(measured):
    return json.loads((measured / "robustness.json").read_text())


def test_cells_are_the_scores_of_the_simulation_where_it_made_them(measured, document):
    scores = read_scores(measured / "scores.csv")
    cells = document["cross_site"]["dice"]
    for row, run in (
        ("fedavg", "fedavg"),
        ("fedbn", "fedbn"),
        ("fedavg-personal", "fedavg-personal"),
        ("pooled", "pooled"),
        ("local-B", "local-B"),
    ):
        for site in {score.site for score in scores if score.run == run}:
            dice = [score.dice for score in scores if (score.run, score.site) == (run, site)]
            assert cells[row][site]["value"] == pytest.approx(np.mean(dice), abs=1e-9)


def test_every_final_network_is_measured_at_every_hospital(document):
    cells = document["cross_site"]["dice"]
    single = [
        f"{run}{site}"
        for run in ("fedbn/", "fedavg-personal/", "fedbn-personal/", "local-", "without-")
        for site in "ABC"
    ]
    assert set(cells) == {*METHODS, "pooled", "local", "leave-one-out", *single}
    for row in ("fedavg", "pooled", "fedbn", *single):
        assert set(cells[row]) == {"A", "B", "C", "X"}
    assert cells["local"]["B"] == cells["local-B"]["B"]
    assert cells["leave-one-out"]["C"] == cells["without-C"]["C"]
    assert cells["fedbn"]["A"] == cells["fedbn/A"]["A"]
    assert cells["fedbn"]["X"]["value"] == pytest.approx(np.mean([cells[f"fedbn/{s}"]["X"]["value"] for s in "ABC"]))
    assert cells["fedavg"]["A"] == cells["fedavg"]["C"]  # neither has a scanner of its own


def test_what_rows_have_in_common_follows_from_their_cells(document):
    cells, rows = (document["cross_site"][key] for key in ("dice", "rows"))
    sites = [cells["fedavg"][site]["value"] for site in "ABC"]
    found = rows["fedavg"]
    assert found["dice"]["value"] == pytest.approx(np.mean(sites))
    assert found["worst_site_dice"]["value"] == min(sites)
    assert found["site_sd"]["value"] == pytest.approx(np.std(sites, ddof=1))
    assert found["worst_to_best"]["value"] == pytest.approx(min(sites) / max(sites))
    assert found["gap"]["value"] == pytest.approx(100 * (np.mean(sites) - cells["fedavg"]["X"]["value"]))
    low, high = found["dice"]["ci95"]
    assert low <= found["dice"]["value"] <= high
    assert set(found["volume"]) == {"liver", "spleen", "kidneys"}
    drops = document["cross_site"]["leave_one_out"]["drop"]["fedavg"]
    assert drops["B"]["value"] == pytest.approx(
        100 * (cells["fedavg"]["B"]["value"] - cells["without-B"]["B"]["value"])
    )
    pairs = {tuple(pair["rows"]) for pair in document["cross_site"]["comparisons"]}
    assert ("fedavg", "pooled") in pairs
    assert len(pairs) == 15


def test_the_grid_measures_against_pooled(document):
    grid = document["grid"]
    assert (grid["reference"], grid["effects"], grid["severities"]) == ("pooled", ["noise", "gain"], [1, 5])
    assert set(grid["rows"]) == {*METHODS, "pooled"}
    pooled, fedavg = grid["rows"]["pooled"], grid["rows"]["fedavg"]
    assert pooled["mean_ce"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    errors = [[1 - one["value"] for one in row["dice"]["noise"]] for row in (fedavg, pooled)]
    assert fedavg["ce"]["noise"]["value"] == pytest.approx(sum(errors[0]) / sum(errors[1]))
    assert fedavg["clean"] == document["cross_site"]["dice"]["fedavg"]["A"]


def test_uncertainty_comes_from_flips_and_from_the_coarser_heads(document):
    for row in ("fedavg", "fedbn", "pooled"):
        found = document["calibration"][row]
        assert 0 <= found["ece"]["value"] <= 1
        assert 0 <= found["brier"]["value"] <= 2
        for kind in ("augmented", "heads"):
            assert 0 <= found["uncertainty"][kind]["mean"] <= 1
        assert set(found["hospitals"]) == {"A", "B", "C", "X"}


def test_pictures_are_drawn(measured):
    for name in ("cross-site", "sites", "severities", "reliability"):
        assert (measured / f"robustness-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_evaluation_goes_on_where_it_was_with_the_same_numbers(simulated, measured, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(simulated, run)
    command = [sys.executable, "-m", "fedseg", "evaluate", "--robustness", run, "--workers", "2"]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while _cases_in(run) < 5:
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.kill()  # the process only: its workers must notice by themselves
    process.wait(60)
    until = time.monotonic() + 60
    while _group_lives(process.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _group_lives(process.pid)
    before = _cases_in(run)
    seen = []
    question = Question(effects=GRID.effects, severities=GRID.severities)
    again = evaluate_run(run, question, Machine(workers=1), progress=lambda done, total: seen.append((done, total)))
    everything = 3 * (3 + 4)  # three cases: A and C see the same, so do they without an effect; B, X; four effects
    assert seen[-1][0] == seen[-1][1] < everything
    assert before >= 5
    assert again == json.loads((measured / "robustness.json").read_text())
    evaluate_run(run, question, Machine(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (0, 0)


def test_parts_that_are_not_asked_for_stay_in_the_file(measured, document, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(measured, run)
    found = evaluate_run(run, Question(parts=("grid",), effects=("noise",), severities=(5,)), Machine())
    assert found["cross_site"] == document["cross_site"]
    assert found["grid"]["effects"] == ["noise"]
    fewer = evaluate_run(run, Question(parts=("calibration",), methods=("fedavg",)), Machine())
    assert "cross_site" not in fewer  # which was of other networks


def test_one_network_is_measured_on_any_labelled_cases(measured, simulated, tmp_path):
    cohort = read_cohort(simulated.parent / "data")
    model = measured / "models" / "pooled.safetensors"
    question = Question(effects=("blur",), severities=(3,), surface=True)
    found = evaluate_model(model, cohort.subset(["phantom_001", "phantom_002"]), tmp_path / "out", question, Machine())
    assert found["grid"]["reference"] is None
    assert "ce" not in found["grid"]["rows"]["pooled"]
    assert found["cross_site"]["rows"]["pooled"]["hd95_mm"]["value"] > 0
    assert (tmp_path / "out" / "robustness.sqlite").exists()


def test_without_shared_test_persons_each_sites_validation_cases_count(tmp_path):
    sites = "".join(
        f'[[sites]]\nname = "{name}"\nphantom = {{ cases = 3, seed = {number}, shape = [16, 16, 16] }}\n'
        for number, name in enumerate(("Aare", "Elbe"))
    )
    scenario = SCENARIO.partition("[source]")[0].format().replace('"local", "leave-one-out"', "").splitlines()
    kept = [line for line in scenario if not line.startswith(("hospitals", "unseen", "personal", "methods.fedbn"))]
    (tmp_path / "tiny.toml").write_text("\n".join(['hospitals.Elbe.scanner = "low-field"', *kept, sites]))
    simulate(load_scenario(tmp_path / "tiny.toml"), tmp_path / "run", Simulator())
    found = evaluate_run(tmp_path / "run", Question(effects=("noise",), severities=(3,)), Machine())
    scores = read_scores(tmp_path / "run" / "scores.csv")
    for site in ("Aare", "Elbe"):
        dice = [score.dice for score in scores if (score.run, score.site) == ("fedavg", site)]
        assert found["cross_site"]["dice"]["fedavg"][site]["value"] == pytest.approx(np.mean(dice), abs=1e-9)
    assert found["persons"] == found["cases"] == 2  # phantoms of equal names at two sites are two persons
    assert "gap" not in found["cross_site"]["rows"]["fedavg"]


def test_wrong_questions_are_refused_with_what_would_be_right(measured, tmp_path):
    def refuse(*arguments):
        done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
        assert isinstance(done.exception, (ConfigError, StoreError)), done.output
        return str(done.exception)

    assert "there are cross-site, grid, calibration" in refuse("--robustness", measured, "--only", "speed")
    assert "it has fedavg, fedbn" in refuse("--robustness", measured, "--methods", "fedprox")
    assert "for mr images" in refuse("--robustness", measured, "--effects", "metal")
    assert "no 'nois'" in refuse("--robustness", measured, "--effects", "nois")
    assert "--data FOLDER" in refuse("--robustness", measured / "models" / "pooled.safetensors")
    assert "no finished simulation" in refuse("--robustness", tmp_path)
    assert "--only is for --robustness" in refuse(measured, "--only", "grid")


def test_a_store_of_another_version_is_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "robustness.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="has version 99"):
        RobustnessStore(tmp_path / "robustness.sqlite")


def test_a_hospital_that_took_no_part_would_get_any_of_the_personal_networks():
    ours, theirs = (Network(Path(name), name) for name in ("ours", "theirs"))
    row = Row("fedbn", "method", (ours, theirs), {"A": ours, "B": theirs})
    assert row.at("A") == (ours,)
    assert row.at("unseen") == (ours, theirs)
    assert Row("local", "local", (), {"A": ours}).at("unseen") == ()


def test_networks_without_coarser_heads_have_none_to_disagree_with():
    from fedseg.robustness.uncertainty import _coarse

    assert _coarse(nn.Conv3d(1, 2, 1), None, lambda *_: torch.zeros(1)) == []


def _cases_in(run):
    try:
        with sqlite3.connect(f"file:{run / 'robustness.sqlite'}?mode=ro", uri=True) as database:
            return database.execute("SELECT COUNT(*) FROM (SELECT DISTINCT view, case_name FROM scores)").fetchone()[0]
    except sqlite3.Error:
        return 0


def _group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
