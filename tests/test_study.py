"""Figures of several seeds with intervals, paired tests, and what a scenario expects, against numbers worked out by hand."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fedseg.case_rows import CaseRow, write_scores
from fedseg.cli import app
from fedseg.errors import ConfigError, StoreError
from fedseg.report.study_tables import difference_table, expected_table, interval_table
from fedseg.report.tables import load_result, mean_of_seeds
from fedseg.robustness.paired import paired
from fedseg.robustness.resampling import Resampling, Value
from fedseg.scenario import load_scenario
from fedseg.scores import headline, summary
from fedseg.study import Study

PERSONS = [f"person-{number}" for number in range(8)]


def rows(run, site, offset, *, seed=0):
    """One structure of each person; persons differ, and so do seeds."""
    return [
        CaseRow(run, site, f"{person}-1", person, "organ", 0.6 + 0.02 * number + offset + 0.01 * seed, 1, 1, 100, 100)
        for number, person in enumerate(PERSONS)
    ]


def write(folder, *, seed=0, fed=(0.1, 0.05), expected=None, methods=("fed",)):
    """A result of two sites and an unseen one: pooled is 0.04 better at A and 0.06 at B, local 0.02 below it at A, above at B."""
    found = []
    for method in methods:
        found += rows(method, "A", fed[0], seed=seed) + rows(method, "B", fed[1], seed=seed) + rows(method, "U", 0.0)
    found += rows("pooled", "A", fed[0] + 0.04, seed=seed) + rows("pooled", "B", fed[1] + 0.06, seed=seed)
    found += rows("pooled", "U", 0.01)
    found += rows("local-A", "A", fed[0] - 0.02, seed=seed) + rows("local-B", "B", fed[1] + 0.02, seed=seed)
    final = {
        name: summary([row for row in found if row.run.startswith(name) and row.site != "U"])
        for name in (*methods, "pooled", "local")
    }
    for name in (*methods, "pooled"):
        of_unseen = [row.dice for row in found if row.run == name and row.site == "U"]
        final[name]["unseen"] = {"U": float(np.mean(of_unseen))}
    result = {
        "name": "made-up",
        "seed": seed,
        "test": "shared",
        "sites": {"A": {"training_cases": 3}, "B": {"training_cases": 3}},
        "final": final,
        "headline": {method: headline(final, method) for method in methods},
        "traffic": {"fed": {"to_95": {"round": 5, "megabytes_per_site": 12.0 + seed}}},
        "hospitals": {},
        "expected": expected or {},
    }
    folder.mkdir()
    write_scores(folder / "scores.csv", found)
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def cells(table):
    return {column.header: [*column.cells] for column in table.columns}


def test_figures_are_those_of_the_result_and_their_intervals_hold_them(tmp_path):
    study = Study([write(tmp_path / "one")])
    fed = study.figures["fed"]
    values = {name: found["value"] for name, found in fed.items()}
    # Mean of the persons is 0.67; fed 0.77 and 0.72, pooled 0.81 and 0.78, local 0.75 and 0.74, unseen 0.67 and 0.68.
    assert values == pytest.approx(
        {
            "dice": 0.745,
            "worst_site": 0.72,
            "unseen": 0.67,
            "R": 100 * 0.745 / 0.795,
            "W": 6.0,
            "G": -2.0,
            "unseen_gain": -1.0,
        }
    )
    assert all(found["ci95"][0] <= found["value"] <= found["ci95"][1] for found in fed.values())
    low, high = fed["dice"]["ci95"]
    standard_error = 0.02 * np.std(range(8)) / np.sqrt(8)
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
    assert fed["W"]["ci95"] == pytest.approx([6.0, 6.0])  # the same for every person
    assert set(study.figures["pooled"]) == {"dice", "worst_site", "unseen"}
    assert study.figures["local"]["dice"]["value"] == pytest.approx(0.745)


def test_several_seeds_are_averaged_and_a_person_counts_in_all_of_them(tmp_path):
    one, two = write(tmp_path / "one"), write(tmp_path / "two", seed=1, fed=(0.12, 0.05))
    study = Study([one, two])
    assert study.figures["fed"]["dice"]["value"] == pytest.approx(0.745 + (0.01 + 0.02) / 2 - 0.005)
    single, both = (Study(directories).figures["fed"]["dice"]["ci95"] for directories in ([one], [one, two]))
    assert both[1] - both[0] == pytest.approx(single[1] - single[0])  # seeds do not make persons more


def test_differences_are_paired(tmp_path):
    study = Study([write(tmp_path / "one")])
    found = study.differences(["fed", "pooled", "local"])
    assert set(found) == {("fed", "pooled"), ("fed", "local"), ("pooled", "local")}
    pair = found["fed", "pooled"]
    assert pair["difference"]["value"] == pytest.approx(-5.0)
    assert pair["difference"]["ci95"] == pytest.approx([-5.0, -5.0])
    assert pair["persons"] == 8
    assert pair["p"] == pytest.approx(2 / 2**8)  # all eight differ in one direction
    assert pair["p_holm"] == pytest.approx(3 * 2 / 2**8)
    assert found["fed", "local"]["difference"]["value"] == pytest.approx(0.0)


def test_a_difference_is_one_of_cases_and_its_test_one_of_persons():
    def cases(gain):
        dice = {("A", "1"): ("p", 0.5), ("A", "2"): ("q", 0.5), ("B", "2"): ("q", 0.5), ("B", "3"): ("q", 0.5)}
        return {case: Value(person, value + gain[case[1]]) for case, (person, value) in dice.items()}

    rows_ = {"one": cases({"1": 0.4, "2": 0.2, "3": -0.1}), "two": cases(dict.fromkeys("123", 0.0))}
    (found,) = paired(rows_, [("one", "two")], Resampling(["p", "q"]))
    assert found["difference"]["value"] == pytest.approx((40 + 20 + 20 - 10) / 4)
    assert found["difference"]["ci95"] == pytest.approx([10, 40])
    assert found["persons"] == 2
    assert found["p"] == 0.5  # both persons gain: two of four ways to give them signs


def test_tables_say_it(tmp_path):
    study = Study([write(tmp_path / "one"), write(tmp_path / "two", seed=1)])
    intervals = cells(interval_table(study))
    assert intervals["W pt"][0] == "6.0\n[dim]6.0 to 6.0[/]"
    assert intervals["MB per site\nto 95 % of pooled"] == ["12.5", "", ""]
    differences = cells(difference_table(study))
    assert differences["method"] == ["fed", "pooled"]
    assert differences["against pooled"] == ["-5.0 (-5.0 to -5.0), p 0.023", ""]
    assert list(cells(difference_table(study, ["local"]))) == ["method", "against local"]
    with pytest.raises(ConfigError, match="--against fedprox: there is no such method; there are fed, pooled, local"):
        difference_table(study, ["fedprox"])


def test_seeds_of_other_methods_are_refused(tmp_path):
    one, two = write(tmp_path / "one"), write(tmp_path / "two", methods=("other",))
    with pytest.raises(StoreError, match=r"two: holds made-up \(other\).*the same methods.*\(fed\)"):
        Study([one, two])
    (one / "scores.csv").unlink()
    with pytest.raises(StoreError, match=r"scores.csv: no such file"):
        Study([one])
    (one / "scores.csv").write_text("run,site\nfed,A\n")
    with pytest.raises(StoreError, match=r"scores.csv: not the scores"):
        Study([one])


def test_a_picture_shows_the_mean_of_the_seeds(tmp_path):
    one, two = write(tmp_path / "one"), write(tmp_path / "two", seed=1)
    found = mean_of_seeds([one, two])
    assert found["final"]["fed"]["sites"] == pytest.approx({"A": 0.775, "B": 0.725})
    assert found["final"]["pooled"]["unseen"] == pytest.approx({"U": 0.68})
    assert found["final"]["local"]["unseen"] == {}
    picture = tmp_path / "study.png"
    assert "Picture: " in CliRunner().invoke(app, ["results", str(one), str(two), "--picture", str(picture)]).stdout
    assert np.asarray(Image.open(picture)).std() > 10
    with pytest.raises(StoreError, match="the same methods"):
        mean_of_seeds([one, write(tmp_path / "other", methods=("other",))])


EXPECTED = {"fed": {"R": {"value": 94, "tolerance": 1}, "W": {"value": 3, "tolerance": 2}}}


def test_results_differ_from_what_was_expected(tmp_path):
    folder = write(tmp_path / "one", expected=EXPECTED)
    table = cells(expected_table([load_result(folder)]))
    assert table["expected"] == ["94.0 ± 1.0", "3.0 ± 2.0"]
    assert table["found"] == ["93.7", "6.0"]
    assert table[""] == ["as expected", "[bold red]differs[/]"]
    assert CliRunner().invoke(app, ["results", str(folder)]).exit_code == 0
    assert CliRunner().invoke(app, ["results", str(folder), "--check"]).exit_code == 1
    as_wanted = write(tmp_path / "two", expected={"fed": {"G": {"value": -2, "tolerance": 0.1}}})
    done = CliRunner().invoke(app, ["results", str(as_wanted), "--check"])
    assert done.exit_code == 0
    assert "as expected" in done.stdout


def test_a_check_of_nothing_is_an_error_and_so_is_a_reference_for_several_studies(tmp_path):
    one = write(tmp_path / "one")
    with pytest.raises(ConfigError, match="expected nothing of this simulation"):
        CliRunner().invoke(app, ["results", str(one), "--check"], catch_exceptions=False)
    other = write(tmp_path / "other")
    result = json.loads((other / "result.json").read_text())
    (other / "result.json").write_text(
        json.dumps(result | {"name": "another", "model": {"name": "unet", "preset": None}})
    )
    with pytest.raises(ConfigError, match="--against compares the methods of one study; these are made-up, another"):
        CliRunner().invoke(app, ["results", str(one), str(other), "--against", "fed"], catch_exceptions=False)


def test_traffic_is_told_where_it_is_known(tmp_path):
    folders = [write(tmp_path / "one"), write(tmp_path / "two", seed=1)]

    def megabytes(*traffic):
        for folder, to_95 in zip(folders, traffic, strict=True):
            result = json.loads((folder / "result.json").read_text())
            (folder / "result.json").write_text(json.dumps(result | {"traffic": {"fed": to_95}}))
        return cells(interval_table(Study(folders))).get("MB per site\nto 95 % of pooled", [None])[0]

    reached, never, not_counted = {"to_95": {"round": 1, "megabytes_per_site": 4.0}}, {"to_95": None}, {}
    assert megabytes(reached, reached) == "4.0"
    assert megabytes(reached, never) == "never in 1 of 2 seeds"
    assert megabytes(never, never) == "never"
    assert megabytes(not_counted, not_counted) is None, "there is no such column"


def test_a_figure_that_is_not_defined_is_not_as_expected(tmp_path):
    folder = write(tmp_path / "one", expected={"local": {"R": {"value": 99, "tolerance": 1}}})
    assert cells(expected_table([load_result(folder)]))["found"] == ["not defined"]
    assert expected_table([load_result(write(tmp_path / "two"))]) is None


SCENARIO = """
baselines = ["pooled"]
[experiment]
name = "tiny"
task = { name = "phantom", modality = "mr", labels = { background = 0, liver = 1 } }
model = { name = "unet", options = { widths = [4, 8] } }
training = { patch_size = [16, 16, 16] }
federation = { rounds = 3 }
[[sites]]
name = "Aare"
phantom = { cases = 4, shape = [16, 16, 16] }
[expected.%s]
R = { value = 99, tolerance = 1 }
"""


def test_a_scenario_expects_something_of_its_own_rounds_and_methods_only(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(SCENARIO % "federated")
    assert load_scenario(path, seed=3).expected["federated"]["R"].value == 99
    assert load_scenario(path, rounds=2).expected == {}
    path.write_text(SCENARIO % "local")
    with pytest.raises(ConfigError, match="expected: there is no method 'local', there are federated, pooled"):
        load_scenario(path)
