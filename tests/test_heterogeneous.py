"""A federation of hospitals that differ, from the scenario to the tables."""

import json
from collections import Counter

import numpy as np
import pytest

from fedseg.case_rows import read_scores
from fedseg.data.phantom import PhantomConfig, write_phantoms
from fedseg.errors import ConfigError
from fedseg.federated.store import RunStore
from fedseg.layout import Layout, lay_out
from fedseg.model_file import read_model_file
from fedseg.report.figures import draw_figures
from fedseg.report.tables import load_result, robustness_table, site_table
from fedseg.scenario import load_scenario
from fedseg.simulation import Machine, simulate
from tests.federated.toys import same
from tests.test_simulation import digests, fedseg

SCENARIO = """
baselines = ["pooled", "local", "leave-one-out"]
personal_epochs = 2

[experiment]
name = "differ"
task = { name = "phantom", modality = "mr", labels = { background = 0, liver = 1, spleen = 2, kidneys = 3 } }
data = { validation_fraction = 0.2, min_cases = 1 }
model = { name = "unet", options = { widths = [4, 8] } }
training = { patch_size = [16, 16, 16], batch_size = 1, steps_per_epoch = 4, learning_rate = 0.01 }
federation = { rounds = 3, min_sites = 1 }

[methods.fedavg]

[source]
data = "cases"
test_fraction = 0.25
[source.partition]
scheme = "sizes"
sizes = [1, 1, 1]
minimum = 2

[hospitals.B]
scanner = "t2-like"
[hospitals.C]
annotator = { name = "generous", habits = [{ name = "generous", severity = 4 }] }
machine = { speed = 0.25 }

[unseen.X]
scanner = "low-field"

[machines]
deadline = 8
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("differ")
    write_phantoms(folder / "cases", PhantomConfig(cases=12, shape=(16, 16, 16)))
    (folder / "differ.toml").write_text(SCENARIO)
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    simulate(load_scenario(folder / "differ.toml"), folder / "out", Machine())
    return folder / "out"


def answers(output, run="fedavg"):
    store = RunStore(output, run)
    try:
        rows = store.rows("SELECT site, status, reason, training FROM updates WHERE run = ?", run)
    finally:
        store.close()
    return [(row["site"], row["status"], row["reason"], json.loads(row["training"] or "{}")) for row in rows]


def test_every_model_is_scored_on_the_same_persons_through_every_scanner(finished):
    rows = read_scores(finished / "scores.csv")
    seen = {
        site: {(row.case, row.label) for row in rows if row.run == "fedavg" and row.site == site} for site in "ABCX"
    }
    assert seen["A"] == seen["B"] == seen["C"] == seen["X"]
    dice = {site: [row.dice for row in rows if row.run == "pooled" and row.site == site] for site in "ABCX"}
    assert dice["A"] == dice["C"], "an annotator does not touch references"
    assert dice["A"] != dice["B"]
    assert dice["A"] != dice["X"]
    references = {
        site: [row.volume_reference for row in rows if row.run == "fedavg" and row.site == site] for site in "AC"
    }
    assert references["A"] == references["C"]


def test_sites_train_on_what_their_scanner_and_their_annotator_make_of_the_cases(finished):
    layout = Layout.model_validate_json((finished / "layout.json").read_text())
    shifts = {site.name: site.shift for site in layout.sites}
    assert shifts["A"] is None
    assert shifts["B"].scanner.name == "T2-like contrast"
    assert shifts["C"].annotator.name == "generous"
    assert layout.views["C"].shift.annotator is None
    assert layout.unseen == ("X",)


def test_a_site_that_was_left_out_is_scored_with_the_others_model(finished):
    result = load_result(finished)
    assert set(result["leave_one_out"]) == {"A", "B", "C"}
    assert "B" not in {site for site, *_ in answers(finished, "without-B")}
    rows = read_scores(finished / "scores.csv")
    assert {row.site for row in rows if row.run == "without-B"} == {"B"}


def test_the_headline_compares_with_hospitals_that_took_no_part(finished):
    result = load_result(finished)
    head, fed, pooled = result["headline"]["fedavg"], result["final"]["fedavg"], result["final"]["pooled"]
    assert head["U"] == pytest.approx(100 * (np.mean(list(fed["sites"].values())) - fed["unseen"]["X"]))
    assert head["U_pooled"] == pytest.approx(100 * (pooled["unseen"]["X"] - fed["unseen"]["X"]))
    assert set(fed["sites"]) == {"A", "B", "C"}
    assert 0 <= fed["dice_p10"] <= fed["dice_mean"]
    assert site_table([result]).row_count == 4
    assert robustness_table([result]).row_count == 4


def test_every_site_may_go_on_alone_and_is_scored_with_what_it_keeps(finished):
    result = load_result(finished)
    assert set(result["headline"]) == {"fedavg", "fedavg-personal"}
    assert set(result["final"]["fedavg-personal"]["sites"]) == {"A", "B", "C"}
    files = {site: read_model_file(finished / "models" / "fedavg-personal" / f"{site}.safetensors") for site in "ABC"}
    shared = read_model_file(finished / "models" / "fedavg.safetensors").weights
    for site, file in files.items():
        assert same(file.weights, shared) == (f", the model of the federation, at {site}" in file.origin)


def test_a_site_trains_on_from_a_federations_model(finished, tmp_path):
    layout = Layout.model_validate_json((finished / "layout.json").read_text())
    site = tmp_path / "site.toml"
    site.write_text(f'name = "A"\ndata = "{layout.sites[0].data}"\ncache = "{layout.sites[0].cache}"\ndevice = "cpu"\n')
    source = finished / "models" / "fedavg.safetensors"
    told = fedseg("personalise", source, "--site", site, "-o", tmp_path / "own.safetensors", "--epochs", 1).stdout
    for candidate in ("the model of the federation", "halfway to 1 epoch of its own", "1 epoch of its own"):
        assert f" mean Dice of the validation persons: {candidate}\n" in told
    assert "kept: " in told
    assert read_model_file(tmp_path / "own.safetensors").weights.keys() == read_model_file(source).weights.keys()
    assert (
        "the model is complete" in fedseg("personalise", source, "--site", site, "-o", tmp_path / "no", expect=2).stderr
    )


def test_pictures_are_drawn_of_hospitals_that_differ(finished):
    assert [path.suffix for path in draw_figures(finished, lambda *_: None)] == [".png"] * 3


def test_a_slow_machine_is_late_on_the_virtual_clock(finished):
    assert Counter(status for site, status, *_ in answers(finished) if site == "C") == {"late": 3}
    seconds = [training["virtual_seconds"] for site, _, _, training in answers(finished) if site == "A"]
    assert seconds == [4.0] * 3


def test_partial_work_counts_if_the_scenario_says_so_and_workers_change_no_bit(folder):
    path = folder / "partial.toml"
    text = SCENARIO.replace("deadline = 8", "deadline = 8\npartial = true\ndropout = 0.3")
    path.write_text(text.replace('baselines = ["pooled", "local", "leave-one-out"]', "baselines = []"))
    for workers in (1, 2):
        simulate(load_scenario(path), folder / f"partial-{workers}", Machine(workers))
    steps = [training["steps"] for site, _, _, training in answers(folder / "partial-1") if site == "C"]
    assert steps == [2.0] * 3
    assert digests(folder / "partial-1", "fedavg") == digests(folder / "partial-2", "fedavg")
    absent = [(site, reason) for site, status, reason, _ in answers(folder / "partial-1") if status == "failed"]
    assert all(reason == "DroppedOut" for _, reason in absent)


def test_phantoms_can_be_dealt_out_too(folder):
    path = folder / "phantoms.toml"
    path.write_text(SCENARIO.replace('data = "cases"', "phantom = { cases = 12, shape = [16, 16, 16] }"))
    layout = lay_out(load_scenario(path), folder / "made")
    cases = [set(site.cases) for site in layout.sites] + [set(layout.test.cases)]
    assert sum(map(len, cases)) == len(set().union(*cases)) == 12
    assert {view.data for view in layout.views.values()} == {str(folder / "made" / "data")}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[hospitals.B]", "[hospitals.Z]", "there is no site 'Z', the sites are A, B, C"),
        ('scanner = "low-field"', 'scanner = "low-fields"', "did you mean 'low-field'"),
        ('scanner = "low-field"', 'scanner = "ct-metal"', "its scanner is for ct, the task is mr"),
        ("[unseen.X]", "[unseen.A]", "'A' is the name of a site that takes part"),
        ("test_fraction = 0.25", "test_fraction = 0.0", "needs test persons that no site has"),
        ("speed = 0.25", "speed = 0", "greater than 0"),
        ('data = "cases"', "", "needs either data or phantom"),
        ('scanner = "low-field"', "machine = { speed = 2 }", "takes no part, so it has a scanner only"),
    ],
)
def test_a_scenario_that_makes_no_sense_is_refused(folder, old, new, message):
    path = folder / "wrong.toml"
    path.write_text(SCENARIO.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_scenario(path)
