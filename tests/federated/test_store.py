import json
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from fedseg import __version__
from fedseg.errors import StoreError
from fedseg.federated.messages import SiteFailure
from fedseg.federated.store import CHECKPOINTS_KEPT, RunStore
from fedseg.federated.weights import digest
from tests.federated.toys import changed_fleet, history, rows, run_toy, same, toy_experiment, toy_state


def checkpoints(output):
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def spoil(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 255
    path.write_bytes(data)


def test_a_run_leaves_its_whole_history(tmp_path):
    experiment = toy_experiment(rounds=2)
    final = run_toy(experiment, tmp_path)
    run = rows(tmp_path, "SELECT * FROM runs")[0]
    assert (run["run"], run["name"], run["digest"]) == ("federated", "toy", experiment.digest())
    assert run["finished"] > run["started"]
    assert json.loads(run["experiment"]) == json.loads(experiment.to_json())
    rounds = rows(tmp_path, "SELECT * FROM rounds ORDER BY server_round")
    assert [(row["server_round"], row["attempts"], json.loads(row["asked"])) for row in rounds] == [
        (0, 0, []), (1, 1, ["A", "B", "C"]), (2, 1, ["A", "B", "C"])
    ]  # fmt: skip
    assert rounds[-1]["weights_sha256"] == digest(final.weights)
    updates = rows(tmp_path, "SELECT * FROM updates WHERE server_round = 1 ORDER BY site")
    assert [row["site"] for row in updates] == ["A", "B", "C"]
    assert all(row["status"] == "accepted" and row["bytes"] == 184 and row["norm"] > 0 for row in updates)
    assert json.loads(updates[0]["quarantined"]) == {"missing-label": 1}
    assert json.loads(updates[0]["training"])["loss"] > 0
    metrics = rows(tmp_path, "SELECT * FROM metrics WHERE name = 'dice/liver' ORDER BY server_round, site")
    assert [(row["server_round"], row["site"]) for row in metrics] == [(n, site) for n in (1, 2) for site in "ABC"]


def test_metrics_come_back_by_round_and_site(tmp_path):
    run_toy(toy_experiment(rounds=2), tmp_path)
    store = RunStore(tmp_path)
    found = store.metrics("dice/liver")
    store.close()
    assert {number: list(sites) for number, sites in found.items()} == {1: ["A", "B", "C"], 2: ["A", "B", "C"]}


def test_only_the_last_checkpoints_are_kept(tmp_path):
    run_toy(toy_experiment(rounds=5), tmp_path)
    assert CHECKPOINTS_KEPT == 2
    assert checkpoints(tmp_path) == ["federated-round-0004.safetensors", "federated-round-0005.safetensors"]


def test_runs_in_one_directory_do_not_touch_each_other(tmp_path):
    experiment = toy_experiment(rounds=1)
    for run in ("local-A", "A", "local-A-B"):
        store = RunStore(tmp_path, run)
        store.begin(experiment, toy_state(experiment))
        store.close()
    assert checkpoints(tmp_path) == [f"{run}-round-0000.safetensors" for run in ("A", "local-A-B", "local-A")]
    store = RunStore(tmp_path, "A")
    store.resume(experiment)
    store.close()
    assert len(checkpoints(tmp_path)) == 3


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path):
    run_toy(toy_experiment(rounds=1), tmp_path)
    with pytest.raises(StoreError, match="holds run 'federated' already; resume it"):
        run_toy(toy_experiment(rounds=1), tmp_path)


def test_resuming_a_finished_run_asks_nobody_and_changes_nothing(tmp_path):
    experiment = toy_experiment()
    before = run_toy(experiment, tmp_path)
    kept = history(tmp_path)

    def never(site, instructions, answer):
        raise AssertionError("was asked")

    after = run_toy(experiment, tmp_path, changed_fleet(never), resume=True)
    assert same(before.weights, after.weights)
    assert history(tmp_path) == kept


def test_resuming_an_empty_directory_starts_the_run(tmp_path):
    run_toy(toy_experiment(), tmp_path / "resumed", resume=True)
    run_toy(toy_experiment(), tmp_path / "new")
    assert history(tmp_path / "resumed") == history(tmp_path / "new")


def test_another_experiment_is_refused_with_the_keys_that_changed(tmp_path):
    run_toy(toy_experiment(), tmp_path)
    with pytest.raises(StoreError, match=r"changed: federation\.proximal_mu 0\.0 -> 0\.1, federation\.rounds 3 -> 4"):
        run_toy(toy_experiment(rounds=4, proximal_mu=0.1), tmp_path, resume=True)


def test_a_damaged_checkpoint_goes_back_one_round_and_ends_the_same(tmp_path):
    experiment = toy_experiment(server_optimizer="momentum")
    run_toy(experiment, tmp_path / "undisturbed")
    run_toy(experiment, tmp_path / "damaged")
    spoil(tmp_path / "damaged" / "checkpoints" / "federated-round-0003.safetensors")
    run_toy(experiment, tmp_path / "damaged", resume=True)
    assert history(tmp_path / "damaged") == history(tmp_path / "undisturbed")
    events = rows(tmp_path / "damaged", "SELECT kind, server_round, detail FROM events ORDER BY id")
    assert [(event["kind"], event["server_round"]) for event in events] == [("went-back", 2), ("resumed", 2)]
    assert "is damaged" in events[0]["detail"]


def test_a_run_without_a_readable_checkpoint_says_so(tmp_path):
    experiment = toy_experiment()
    run_toy(experiment, tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(StoreError, match=r"no readable checkpoint: .*no such checkpoint"):
        run_toy(experiment, tmp_path, resume=True)


def test_leftovers_of_a_crash_are_removed_on_resume(tmp_path):
    experiment = toy_experiment()
    run_toy(experiment, tmp_path)
    for name in ("federated-round-0004.safetensors", ".federated-round-0004.safetensors.123.part"):
        (tmp_path / "checkpoints" / name).write_bytes(b"half")
    run_toy(experiment, tmp_path, resume=True)
    assert checkpoints(tmp_path) == ["federated-round-0002.safetensors", "federated-round-0003.safetensors"]


def test_a_file_that_is_no_run_store_is_refused(tmp_path):
    (tmp_path / "store.sqlite").write_bytes(b"something else" * 100)
    with pytest.raises(StoreError, match=r"store\.sqlite: not a run store"):
        RunStore(tmp_path)


def test_a_store_of_a_later_release_is_refused(tmp_path):
    RunStore(tmp_path).close()
    database = sqlite3.connect(tmp_path / "store.sqlite")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreError, match="version 99 is not 4"):
        RunStore(tmp_path)


def test_two_processes_cannot_run_one_run(tmp_path):
    """The lock is the open file's, so a second store in this process meets it as another process would."""
    experiment = toy_experiment()
    first, second, other = RunStore(tmp_path), RunStore(tmp_path), RunStore(tmp_path, "local-A")
    first.begin(experiment, toy_state(experiment))
    with pytest.raises(StoreError, match="another process is running 'federated'"):
        second.resume(experiment)
    other.begin(experiment, toy_state(experiment))
    assert second.rows("SELECT run FROM runs ORDER BY run") == [{"run": "federated"}, {"run": "local-A"}]
    first.close()
    assert second.resume(experiment).server_round == 0
    second.close()
    other.close()


def test_changed_data_of_a_site_are_noticed_once(tmp_path, caplog):
    experiment = toy_experiment(rounds=3)
    manifests = {1: "a" * 64, 2: "b" * 64, 3: "b" * 64}

    def with_manifest(site, instructions, answer):
        return replace(answer, manifest=manifests.get(instructions.server_round, "") if site == "B" else "c" * 64)

    run_toy(experiment, tmp_path, fleet=changed_fleet(with_manifest))
    events = rows(tmp_path, "SELECT server_round, site, detail FROM events WHERE kind = 'data-changed'")
    assert events == [{"server_round": 2, "site": "B", "detail": "since round 1"}]
    assert "the data of B have changed" in caplog.text


TO_VERSION_2 = (
    "ALTER TABLE updates DROP COLUMN cosine; ALTER TABLE runs DROP COLUMN software; DROP TABLE phases; DROP TABLE requests; "
    "PRAGMA user_version = 2"
)


def test_a_store_from_before_phases_and_cosines_is_taken_over_and_its_run_goes_on(tmp_path):
    experiment = toy_experiment(rounds=3)
    run_toy(experiment, tmp_path / "undisturbed")

    def interrupt(site, instructions, answer):
        if instructions.server_round == 3:
            raise InterruptedError
        return answer

    with pytest.raises(InterruptedError):
        run_toy(experiment, tmp_path / "old", changed_fleet(interrupt))
    with closing(sqlite3.connect(tmp_path / "old" / "store.sqlite")) as database:
        database.executescript(TO_VERSION_2)
    run_toy(experiment, tmp_path / "old", resume=True)
    kept = rows(tmp_path / "old", "SELECT server_round, count(cosine) AS n FROM updates GROUP BY server_round")
    assert [row["n"] for row in kept] == [0, 0, 3]
    phases = rows(tmp_path / "old", "SELECT DISTINCT server_round FROM phases")
    assert [row["server_round"] for row in phases] == [3]
    for table in ("rounds", "metrics"):
        assert history(tmp_path / "old")[table] == history(tmp_path / "undisturbed")[table]
    assert rows(tmp_path / "old", "PRAGMA user_version") == [{"user_version": 4}]
    assert rows(tmp_path / "old", "SELECT software FROM runs") == [{"software": None}]  # nobody knows any more


def test_a_store_is_taken_over_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    RunStore(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database:
        database.executescript(TO_VERSION_2)
    with monkeypatch.context() as broken:
        broken.setattr("fedseg.federated.store.SCHEMA", "CREATE TABLE IF NOT EXISTS half (x); broken")
        with pytest.raises(StoreError, match="syntax error"):
            RunStore(tmp_path)
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (2,)
    RunStore(tmp_path).close()
    assert rows(tmp_path, "SELECT cosine FROM updates") == rows(tmp_path, "SELECT * FROM requests") == []


def test_phases_of_a_round_add_up_to_it_and_the_checkpoint_is_written_down_after_its_commit(tmp_path):
    run_toy(toy_experiment(rounds=2), tmp_path)
    found = {}
    for row in rows(tmp_path, "SELECT * FROM phases"):
        found.setdefault(row["server_round"], {})[row["phase"]] = row["seconds"]
    assert {number: set(phases) for number, phases in found.items()} == {
        0: {"checkpoint"},
        1: {"broadcast", "wait", "aggregate", "checkpoint"},
        2: {"broadcast", "wait", "aggregate", "evaluate", "checkpoint"},
    }
    for number in (1, 2):
        (round_,) = rows(tmp_path, f"SELECT seconds FROM rounds WHERE server_round = {number}")
        during = sum(found[number][phase] for phase in ("broadcast", "wait", "aggregate"))
        assert during == pytest.approx(round_["seconds"], abs=1e-9)
    assert all(seconds >= 0 for phases in found.values() for seconds in phases.values())


def test_a_round_that_is_gone_back_on_takes_its_phases_along(tmp_path):
    experiment = toy_experiment()
    run_toy(experiment, tmp_path)
    spoil(tmp_path / "checkpoints" / "federated-round-0003.safetensors")
    store = RunStore(tmp_path)
    assert store.resume(experiment).server_round == 2
    assert store.rows("SELECT max(server_round) AS last FROM phases") == [{"last": 2}]
    store.close()


def test_every_request_is_counted_with_what_it_carried(tmp_path):
    calls = []

    def change(site, instructions, answer):
        calls.append(site)
        return SiteFailure("A", 1, "failed", "OSError") if calls == ["A"] else answer

    run_toy(toy_experiment(rounds=2, min_sites=3), tmp_path, changed_fleet(change))
    kept = rows(tmp_path, "SELECT server_round, site, bytes FROM requests ORDER BY rowid")
    asked = [(number, site) for number in (1, 1, 2, 3) for site in "ABC"]  # a repetition; and the closing evaluation
    assert [(row["server_round"], row["site"]) for row in kept] == asked
    assert {row["bytes"] for row in kept} == {184}


def test_a_store_from_before_data_manifests_is_taken_over(tmp_path):
    experiment = toy_experiment(rounds=2)
    run_toy(experiment, tmp_path)
    with closing(sqlite3.connect(tmp_path / "store.sqlite")) as database:
        database.executescript(f"{TO_VERSION_2}; ALTER TABLE updates DROP COLUMN manifest; PRAGMA user_version = 1")
    store = RunStore(tmp_path)
    assert store.resume(experiment).server_round == 2
    assert {row["manifest"] for row in store.rows("SELECT manifest FROM updates")} == {None}
    store.close()


def test_a_run_remembers_its_libraries_and_tells_if_it_went_on_with_others(tmp_path, monkeypatch):
    experiment = toy_experiment(rounds=2)
    run_toy(experiment, tmp_path)
    (kept,) = rows(tmp_path, "SELECT software FROM runs")
    began = json.loads(kept["software"])
    assert began["torch"] == torch.__version__
    assert began["fedseg"] == __version__
    assert set(began) == {"fedseg", "python", "torch", "monai", "flwr", "numpy"}
    for now, told in ((began, ""), (began | {"torch": "9.0"}, f"torch {torch.__version__} -> 9.0")):
        monkeypatch.setattr("fedseg.federated.store.software", lambda now=now: now)
        store = RunStore(tmp_path)
        store.resume(experiment)
        assert store.rows("SELECT detail FROM events WHERE kind = 'resumed' ORDER BY id DESC LIMIT 1") == [
            {"detail": told}
        ]
        store.close()
    assert json.loads(rows(tmp_path, "SELECT software FROM runs")[0]["software"]) == began
