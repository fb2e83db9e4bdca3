import csv
import io
import json
import shutil
import sqlite3
from contextlib import closing

import pytest
from typer.testing import CliRunner

from fedseg.cli import app
from fedseg.coordinator.history import sparkline
from fedseg.errors import StoreError
from fedseg.federated.messages import SiteFailure
from tests.federated.toys import changed_fleet, rows, run_toy, toy_experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two run directories; in the second one a site abstains once."""
    folder = tmp_path_factory.mktemp("runs")
    run_toy(toy_experiment(rounds=2), folder / "first")

    def change(site, instructions, answer):
        return (
            SiteFailure("C", 2, "abstained", "too-few-cases")
            if (site, instructions.server_round) == ("C", 2)
            else answer
        )

    run_toy(toy_experiment(rounds=3, min_sites=2), folder / "deep" / "second", fleet=changed_fleet(change))
    return folder


def fedseg(*arguments):
    done = CliRunner().invoke(app, ["server", *map(str, arguments)], env={"COLUMNS": "250"})
    assert done.exit_code == 0, done.output
    return done.stdout


def test_every_run_below_a_folder_is_listed(folder):
    told = fedseg("runs", folder)
    assert "first federated" in told
    assert "deep/second federated" in told
    assert told.count("finished") == 2


def test_a_folder_without_runs_says_so(tmp_path):
    done = CliRunner().invoke(app, ["server", "runs", str(tmp_path)])
    assert isinstance(done.exception, StoreError)
    assert "holds no run store" in str(done.exception)


@pytest.mark.parametrize("command", ["runs", "show", "export", "metrics", "watch"])
def test_a_folder_that_is_not_there_says_so(command, tmp_path):
    done = CliRunner().invoke(app, ["server", command, str(tmp_path / "nowhere")])
    assert "nowhere: no such folder" in str(done.exception)


def test_a_run_is_told_round_by_round_with_what_went_wrong(folder):
    told = fedseg("show", folder / "deep" / "second")
    assert "C: abstained (too-few-cases)" in told
    assert "2 of 3" in told
    assert told.count("3 of 3") == 2
    stored = rows(folder / "deep" / "second", "SELECT min(cosine) AS lowest, site FROM updates GROUP BY server_round")
    assert all(f"{row['lowest']:.2f} {row['site']}" in told for row in stored)


def test_a_run_of_an_earlier_release_is_told_without_what_it_did_not_keep(folder, tmp_path):
    shutil.copytree(folder / "first", tmp_path / "old")
    with closing(sqlite3.connect(tmp_path / "old" / "store.sqlite")) as database:
        database.executescript("ALTER TABLE updates DROP COLUMN cosine; DROP TABLE phases; DROP TABLE requests")
    assert fedseg("show", tmp_path / "old").count("3 of 3") == 2
    assert json.loads(fedseg("export", tmp_path / "old", "--as", "json"))["phases"] == []


def test_a_run_that_is_not_there_is_named_with_those_that_are(folder):
    done = CliRunner().invoke(app, ["server", "show", str(folder / "first"), "--run", "pooled"])
    assert "holds no run 'pooled'; it holds federated" in str(done.exception)


def test_an_exported_table_has_a_line_per_round(folder):
    lines = list(csv.DictReader(io.StringIO(fedseg("export", folder / "deep" / "second"))))
    assert [line["server_round"] for line in lines] == ["1", "2", "3"]
    stored = rows(folder / "deep" / "second", "SELECT seconds FROM rounds WHERE server_round > 0 ORDER BY server_round")
    assert [float(line["seconds"]) for line in lines] == [row["seconds"] for row in stored]
    assert lines[1]["failures"] == "C: abstained (too-few-cases)"


def test_an_exported_document_has_all_that_the_store_knows(folder, tmp_path):
    fedseg("export", folder / "first", "--as", "json", "--output", tmp_path / "run.json")
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["experiment"]["name"] == "toy"
    assert len(document["updates"]) == 6
    assert {row["site"] for row in document["metrics"]} == {"A", "B", "C"}
    assert all(-1 <= row["cosine"] <= 1 for row in document["updates"])
    assert {row["phase"] for row in document["phases"]} == {"broadcast", "wait", "aggregate", "evaluate", "checkpoint"}
    assert len(document["requests"]) == 9


@pytest.mark.parametrize(
    ("values", "bars"),
    [([0, 1], "▁█"), ([0, None, 7, 3], "▁ █▄"), ([2, 2], "▁▁"), ([None], ""), ([float("nan"), 1.0], " ▁")],
)
def test_bars_run_from_the_smallest_to_the_largest_value(values, bars):
    assert sparkline(values) == bars
