import json
import re
import shutil
import sqlite3
import subprocess
import urllib.request
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fedseg.coordinator.exporter import CATALOGUE, RunCollector, catalogue_table, serve
from fedseg.errors import ConfigError
from fedseg.federated.messages import SiteFailure
from fedseg.federated.phases import PHASES
from tests.federated.toys import changed_fleet, run_toy, toy_experiment

ROOT = Path(__file__).parents[2]


def scrape(directory):
    """All samples by name and labels."""
    registry = CollectorRegistry()
    registry.register(RunCollector(directory))
    text = generate_latest(registry).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.items() - {("run", "federated")})] = sample.value
    return text, found


def value(found, name, **labels):
    return found[name, frozenset(labels.items())]


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    """Three rounds in which B sends NaN once, C abstains twice and A changes its data."""
    output = tmp_path_factory.mktemp("run")

    def change(site, instructions, answer):
        number = instructions.server_round
        if site == "B" and number == 2 and instructions.train:
            return replace(answer, delta={name: np.full_like(array, np.nan) for name, array in answer.delta.items()})
        if site == "C" and number > 1:
            return SiteFailure("C", number, "abstained", "too-few-cases")
        return replace(answer, manifest=("a" if number < 3 else "b") * 64) if site == "A" else answer

    run_toy(toy_experiment(rounds=3, min_sites=1), output, fleet=changed_fleet(change))
    return output


def test_the_series_say_what_happened(eventful):
    _, found = scrape(eventful)
    assert value(found, "fedseg_rounds_finished") == value(found, "fedseg_rounds_planned") == 3
    assert value(found, "fedseg_run_finished") == 1
    assert value(found, "fedseg_sites_asked") == 3
    assert value(found, "fedseg_sites_accepted") == 2
    answers = {(s, k): value(found, "fedseg_site_answers_total", site=s, status=k) for s in "ABC" for k in STATUSES}
    told = {key: count for key, count in answers.items() if count}
    assert told == {
        ("A", "accepted"): 3,
        ("B", "accepted"): 2,
        ("B", "refused"): 1,
        ("C", "accepted"): 1,
        ("C", "abstained"): 2,
    }
    failures = value(found, "fedseg_site_failures_total", site="C", status="abstained", reason="too-few-cases")
    assert failures == 2
    assert value(found, "fedseg_site_failures_total", site="B", status="refused", reason="non-finite") == 1
    assert [value(found, "fedseg_site_last_round", site=site) for site in "ABC"] == [3, 3, 1]
    assert [value(found, "fedseg_site_data_changes_total", site=site) for site in "ABC"] == [1, 0, 0]
    assert value(found, "fedseg_site_received_bytes_total", site="B") == 2 * value(
        found, "fedseg_site_update_bytes", site="B"
    )
    sent = [value(found, "fedseg_site_sent_bytes_total", site=site) for site in "ABC"]
    assert sent == [4 * value(found, "fedseg_site_update_bytes", site="A")] * 3, (
        "three rounds and the closing evaluation"
    )
    assert all(-1 <= value(found, "fedseg_site_update_cosine", site=site) <= 1 for site in "ABC")


def test_phases_of_the_last_round_add_up_and_nothing_is_done_after_the_end(eventful):
    _, found = scrape(eventful)
    seconds = {phase: value(found, "fedseg_round_phase_seconds", phase=phase) for phase in PHASES}
    during = seconds["broadcast"] + seconds["wait"] + seconds["aggregate"]
    assert during == pytest.approx(value(found, "fedseg_round_duration_seconds"), abs=1e-9)
    assert value(found, "fedseg_round_current") == 0
    assert {value(found, "fedseg_round_phase", phase=phase) for phase in PHASES} == {0}


def test_while_a_round_runs_its_number_and_its_phase_are_told_and_not_after_its_process_has_died(tmp_path):
    seen = []

    def look(site, instructions, answer):
        seen.append(scrape(tmp_path)[1])
        if len(seen) == 5:
            raise InterruptedError
        return answer

    with pytest.raises(InterruptedError):
        run_toy(toy_experiment(rounds=3), tmp_path, fleet=changed_fleet(look))
    assert [value(found, "fedseg_round_current") for found in seen] == [1, 1, 1, 2, 2]
    for found in seen:
        assert {phase for phase in PHASES if value(found, "fedseg_round_phase", phase=phase)} == {"wait"}
    after = scrape(tmp_path)[1]
    assert value(after, "fedseg_round_current") == 0, "the file is still there, but nobody holds the lock"
    assert {value(after, "fedseg_round_phase", phase=phase) for phase in PHASES} == {0}


def test_distances_have_their_mean_and_the_largest_is_the_worst(tmp_path):
    distances = {"A": 3.0, "B": 8.0, "C": 4.0}

    def change(site, instructions, answer):
        more = {"hd95/liver/sum": 2 * distances[site], "hd95/liver/count": 2.0}
        return replace(answer, sums=answer.sums | more) if answer.sums else answer

    run_toy(toy_experiment(rounds=1), tmp_path, fleet=changed_fleet(change))
    _, found = scrape(tmp_path)
    assert value(found, "fedseg_score_mean", metric="hd95/liver") == 5
    assert value(found, "fedseg_score_worst", metric="hd95/liver") == 8
    assert value(found, "fedseg_site_score", site="C", metric="hd95/liver") == 4


@pytest.mark.parametrize(
    ("dice", "improvement", "since"), [([0.5, 0.7], 0.2, 0), ([0.7, 0.5, 0.6], -0.1, 2), ([0.5], None, 0)]
)
def test_improvement_is_the_newest_mean_dice_against_the_best_before_it(tmp_path, dice, improvement, since):
    def change(site, instructions, answer):
        if not answer.sums:
            return answer
        number = instructions.server_round - 2  # the weights that are scored are those of the round before
        return replace(answer, sums={"dice/liver/sum": 2 * dice[number], "dice/liver/count": 2.0})

    run_toy(toy_experiment(rounds=len(dice)), tmp_path, fleet=changed_fleet(change))
    _, found = scrape(tmp_path)
    if improvement is None:
        assert "fedseg_dice_improvement" not in {name for name, _ in found}
    else:
        assert value(found, "fedseg_dice_improvement") == pytest.approx(improvement)
    assert value(found, "fedseg_rounds_since_best") == since


def test_a_store_of_an_earlier_release_has_the_series_that_it_can_have(tmp_path):
    run_toy(toy_experiment(rounds=2), tmp_path)
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database:
        database.executescript("ALTER TABLE updates DROP COLUMN cosine; DROP TABLE phases; DROP TABLE requests")
    names = {name for name, _ in scrape(tmp_path)[1]}
    assert {"fedseg_site_update_norm", "fedseg_round_phase", "fedseg_score_mean"} <= names
    assert not {"fedseg_site_update_cosine", "fedseg_round_phase_seconds", "fedseg_site_sent_bytes_total"} & names


def test_a_state_folder_that_was_empty_at_first_has_series_as_soon_as_its_study_has_begun(tmp_path):
    server, thread = serve(tmp_path)

    def series():
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as answer:
            return answer.read().decode()

    try:
        assert "fedseg_rounds_finished" not in series()
        run_toy(toy_experiment(rounds=1), tmp_path / "run")
        (tmp_path / "status.json").write_text("{}")
        assert 'fedseg_rounds_finished{run="federated"} 1.0' in series()
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


MACHINE = {series.name for series in CATALOGUE.values() if "run" not in series.labels}
STATUSES = ("accepted", "abstained", "failed", "late", "refused")


def test_scores_are_those_of_the_newest_scored_weights(eventful):
    _, found = scrape(eventful)
    assert value(found, "fedseg_score_round") == 3
    by_site = [
        v for (name, labels), v in found.items() if name == "fedseg_site_score" and ("metric", "dice/liver") in labels
    ]
    assert value(found, "fedseg_score_mean", metric="dice/liver") == pytest.approx(sum(by_site) / len(by_site))
    assert value(found, "fedseg_score_worst", metric="dice/liver") == min(by_site)


def test_every_series_is_in_the_catalogue_and_has_no_more_labels_than_that(eventful):
    text, found = scrape(eventful)
    known = {series.exposed_name: set(series.labels) for series in CATALOGUE.values()}
    for name, labels in found:
        assert {key for key, _ in labels} | {"run"} == known[name] | {"run"}, name
    assert "case" not in {label for series in CATALOGUE.values() for label in series.labels}
    missing = {series.name for series in CATALOGUE.values() if series.exposed_name not in text}
    assert missing - MACHINE <= {"fedseg_site_training_seconds"}  # toys take no time


def test_the_documented_catalogue_is_the_real_one():
    documented = (ROOT / "docs" / "metrics.md").read_text()
    assert catalogue_table() in documented, "make it again from catalogue_table()"


def test_a_directory_without_a_run_has_no_series(tmp_path):
    assert scrape(tmp_path)[1] == {}


def test_scrapes_are_answered_over_http_and_a_taken_port_is_named(eventful):
    server, thread = serve(eventful)
    port = server.server_port
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert 'fedseg_rounds_finished{run="federated"} 3.0' in answer.read().decode()
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: cannot listen there"):
            serve(eventful, port=port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
def test_promtool_finds_nothing_wrong_with_the_series(eventful):
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=scrape(eventful)[0], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_rules_name_series_that_exist():
    text = (ROOT / "deploy" / "prometheus" / "rules.yml").read_text()
    recorded = set(re.findall(r"record: (\S+)", text))
    known = {series.exposed_name for series in CATALOGUE.values()} | recorded
    expressions = re.findall(r"expr: (?:>\n((?:          .*\n)+)|(.*)\n)", text)
    used = {name for pair in expressions for name in re.findall(r"fedseg[a-z0-9_:]+", "".join(pair))} - {
        "fedseg-coordinator"
    }
    assert used
    assert used <= known, used - known


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
@pytest.mark.parametrize("check", ["check config prometheus.yml", "check rules rules.yml", "test rules rules_test.yml"])
def test_promtool_finds_nothing_wrong_with_configuration_and_rules(check):
    done = subprocess.run(
        ["promtool", *check.split()], cwd=ROOT / "deploy" / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_panel_of_the_dashboard_asks_for_series_that_exist():
    board = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "study.json").read_text())
    recorded = re.findall(r"record: (\S+)", (ROOT / "deploy" / "prometheus" / "rules.yml").read_text())
    known = {series.exposed_name for series in CATALOGUE.values()} | set(recorded)
    for panel in board["panels"]:
        asked = {name for target in panel["targets"] for name in re.findall(r"fedseg[a-z0-9_:]+", target["expr"])}
        assert asked, panel["title"]
        assert asked <= known, panel["title"]
