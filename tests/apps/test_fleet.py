"""Rounds over Flower's messages are the rounds of a plain loop, whatever the nodes do."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

import client.app
from fedseg import __version__, flower, puller
from fedseg.errors import QuorumError
from fedseg.federated.driver import run_federation
from fedseg.federated.messages import Answer, RoundInstructions, SiteFailure, SiteUpdate
from fedseg.federated.networks import start_state
from fedseg.federated.store import RunStore
from fedseg.federated.weights import digest
from fedseg.flower import FlowerFleet, reply_to
from fedseg.members import Member
from fedseg.site.config import load_site
from tests.apps.grid import LoopGrid, Node
from tests.apps.hospitals import gates, run_as_loop, tiny_experiment, write_hospitals

INSTRUCTIONS = RoundInstructions(3, {"w": np.ones(2, np.float32)}, "{}")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flower, "POLL", (0.001, 0.01))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Echo:
    """A site that sends back what it got."""

    def __init__(self, site: str) -> None:
        self.site, self.version = site, __version__

    def __enter__(self) -> "Echo":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def describe(self) -> "Echo":
        return self

    def ask(self, instructions: bytes, *, train: bool) -> bytes:
        received = RoundInstructions.decode(instructions)
        return SiteUpdate(self.site, received.server_round, received.weights, 1).encode()


def echo(name: str) -> Node:
    app = ClientApp()

    @app.query()
    @app.train()
    @app.evaluate()
    def answer(message: Message, context: Context) -> Message:
        return reply_to(message, lambda: Echo(name))

    return Node(app, {})


def answers_of(fleet: FlowerFleet, sites: list[str], deadline: float | None = None) -> dict[str, Answer]:
    return {answer.site: answer for answer in fleet.exchange(INSTRUCTIONS, sites, deadline)}


def test_rounds_over_flower_give_the_weights_of_a_plain_loop_to_the_last_bit(tmp_path: Path) -> None:
    files, experiment = write_hospitals(tmp_path), tiny_experiment()
    expected = run_as_loop(experiment, files, tmp_path / "loop")
    store = RunStore(tmp_path / "flower")
    with gates(map(load_site, files.values())) as nodes:
        grid = LoopGrid(nodes)
        state = run_federation(experiment, FlowerFleet(grid, min_sites=3), store, lambda: start_state(experiment))
    loop = RunStore(tmp_path / "loop")
    assert digest(state.weights) == digest(expected.weights)
    assert store.is_finished()
    query = "SELECT server_round, site, name, value FROM metrics ORDER BY server_round, site, name"
    assert store.rows(query) == loop.rows(query)
    assert len(store.rows(query)) > 0


def test_a_broken_site_drops_out_without_naming_its_files(tmp_path: Path) -> None:
    files, experiment = write_hospitals(tmp_path), tiny_experiment()
    for image in (tmp_path / "Loire" / "data" / "imagesTr").iterdir():
        image.with_name("Mustermann_Max" + image.name).write_bytes(image.read_bytes()[:50])
        image.unlink()
    expected = run_as_loop(experiment, files, tmp_path / "loop")
    store = RunStore(tmp_path / "flower")
    with gates(map(load_site, files.values())) as nodes:
        grid = LoopGrid(nodes)
        state = run_federation(experiment, FlowerFleet(grid, min_sites=3), store, lambda: start_state(experiment))
    rows = store.rows("SELECT site, status FROM updates WHERE server_round = 1 ORDER BY site")
    assert [row["status"] == "accepted" for row in rows] == [True, True, False]
    assert digest(state.weights) == digest(expected.weights)
    for secret in (b"Mustermann", str(tmp_path).encode(), b"imagesTr"):
        assert not any(secret in data for data in grid.carried)


def test_no_more_than_one_update_is_pulled_at_once() -> None:
    grid = LoopGrid({number: echo(f"S{number:02d}") for number in range(20)})
    fleet = FlowerFleet(grid)
    answers = answers_of(fleet, list(fleet.sites()))
    assert len(answers) == 20
    assert grid.most_pulled == 1


def test_answers_are_yielded_as_they_arrive() -> None:
    grid = LoopGrid({1: replace(echo("Aare"), polls=0), 2: echo("Elbe")})
    fleet = FlowerFleet(grid)
    sites = list(fleet.sites())
    grid.nodes[1].polls = 5
    assert [answer.site for answer in fleet.exchange(INSTRUCTIONS, sites, None)] == ["Elbe", "Aare"]


def test_all_requests_are_handed_over_before_the_first_answer_is_waited_for() -> None:
    grid = LoopGrid({1: echo("Aare"), 2: echo("Elbe")})
    fleet = FlowerFleet(grid)
    sites, before = list(fleet.sites()), len(grid.carried)
    answers = fleet.exchange(INSTRUCTIONS, sites, None)
    assert len(grid.carried) > before, "Flower has carried them to the nodes, which have answered"
    assert {answer.site for answer in answers} == {"Aare", "Elbe"}


def test_a_site_that_misses_the_deadline_is_late() -> None:
    grid = LoopGrid({1: echo("Aare"), 2: echo("Elbe")})
    fleet = FlowerFleet(grid)
    sites = list(fleet.sites())
    grid.nodes[2].silent = True
    answers = answers_of(fleet, sites, deadline=0.05)
    assert isinstance(answers["Aare"], SiteUpdate)
    assert answers["Elbe"] == SiteFailure("Elbe", 3, "late", "deadline")


def test_an_answer_that_is_cut_off_in_the_middle_keeps_neither_the_others_nor_the_deadline_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(puller, "STUCK_SECONDS", 0.1)
    grid = LoopGrid({1: echo("Aare"), 2: echo("Elbe"), 3: echo("Loire")})
    fleet = FlowerFleet(grid)
    sites = list(fleet.sites())
    grid.nodes[1].cut_off = restored = threading.Event()
    answers = answers_of(fleet, sites, deadline=3.0)
    assert answers["Aare"] == SiteFailure("Aare", 3, "late", "deadline")
    assert all(isinstance(answers[site], SiteUpdate) for site in ("Elbe", "Loire"))
    restored.set()
    grid.nodes[1].cut_off = None
    assert isinstance(answers_of(fleet, sites)["Aare"], SiteUpdate), "it takes part in the next round"


def test_a_site_whose_key_is_revoked_while_its_answer_arrives_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(puller, "STUCK_SECONDS", 0.1)
    grid = LoopGrid({1: echo("Aare"), 2: echo("Elbe")})
    members = {1: Member("Aare", 0.0), 2: Member("Elbe", 0.0)}
    fleet = FlowerFleet(grid, who=lambda: members)
    sites = list(fleet.sites())
    grid.nodes[2].cut_off = threading.Event()
    answers = fleet.exchange(INSTRUCTIONS, sites, None)
    assert isinstance(next(answers), SiteUpdate)
    del members[2]
    assert list(answers) == [SiteFailure("Elbe", 3, "failed", "NodeUnavailable")]
    grid.nodes[2].cut_off.set()


def test_a_site_that_left_fails_and_the_others_answer() -> None:
    grid = LoopGrid({1: echo("Aare"), 2: echo("Elbe"), 3: echo("Loire")})
    fleet = FlowerFleet(grid)
    sites = list(fleet.sites())
    grid.nodes[2].online = False
    grid.nodes[3].crash = ErrorCode.NODE_UNAVAILABLE
    answers = answers_of(fleet, [*sites, "Rhein"])
    assert isinstance(answers["Aare"], SiteUpdate)
    assert {site: answers[site].reason for site in ("Elbe", "Loire", "Rhein")} == {
        "Elbe": "NotReached",
        "Loire": "NodeUnavailable",
        "Rhein": "NotReached",
    }


def test_a_site_that_comes_later_takes_part() -> None:
    grid = LoopGrid({1: echo("Aare"), 2: replace(echo("Elbe"), online=False)})
    fleet = FlowerFleet(grid)
    assert fleet.sites() == ["Aare"]
    grid.nodes[2].online = True
    assert fleet.sites() == ["Aare", "Elbe"]


def test_of_two_nodes_with_one_name_the_first_is_asked() -> None:
    grid = LoopGrid({1: echo("Aare"), 2: replace(echo("Aare"), online=False)})
    fleet = FlowerFleet(grid)
    fleet.sites()
    grid.nodes[2].online = True
    assert fleet.sites() == ["Aare"]
    grid.nodes[2].crash = ErrorCode.CLIENT_APP_CRASHED
    assert isinstance(answers_of(fleet, ["Aare"])["Aare"], SiteUpdate)


def test_a_node_takes_over_the_name_of_one_that_left() -> None:
    grid = LoopGrid({1: echo("Aare"), 2: echo("Aare")})
    fleet = FlowerFleet(grid)
    fleet.sites()
    grid.nodes[1].online = False
    assert fleet.sites() == ["Aare"]
    assert isinstance(answers_of(fleet, ["Aare"])["Aare"], SiteUpdate)


def test_a_site_that_changed_its_name_is_asked_for_it_again() -> None:
    grid = LoopGrid({1: echo("Aare")})
    fleet = FlowerFleet(grid)
    fleet.sites()
    grid.nodes[1] = echo("Elbe")
    assert answers_of(fleet, ["Aare"])["Aare"] == SiteFailure("Aare", 3, "failed", "WrongName")
    assert fleet.sites() == ["Elbe"]


def test_a_node_that_cannot_say_its_name_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    nameless = Node(client.app.app, {"socket": f"/data/Mustermann_Max/{'x' * 100}.sock"})
    fleet = FlowerFleet(LoopGrid({1: nameless, 2: echo("Elbe"), 3: Node(client.app.app, {})}))
    with caplog.at_level("WARNING", "fedseg.flower"):
        assert fleet.sites() == ["Elbe"]
    told = [record.message for record in caplog.records if "did not say" in record.message]
    assert len(told) == 2
    assert all("ConfigError" in line and "Mustermann" not in line for line in told)


@pytest.mark.parametrize("name", ["", "../etc", "a b", "x" * 200, 3])
def test_a_name_that_is_no_name_is_refused(name: object) -> None:
    app = ClientApp()

    @app.query()
    def answer(message: Message, context: Context) -> Message:
        return Message(RecordDict({"site": ConfigRecord({"name": name})}), reply_to=message)

    assert FlowerFleet(LoopGrid({1: Node(app, {}), 2: echo("Elbe")})).sites() == ["Elbe"]


def test_too_few_sites_are_waited_for_and_then_named() -> None:
    fleet = FlowerFleet(LoopGrid({1: echo("Aare")}), min_sites=3, patience=0.05)
    with pytest.raises(QuorumError, match=r"1 of 3 sites were connected after 0 s \(Aare\); start the SuperNodes"):
        fleet.sites()


def test_an_engine_that_died_is_noticed_while_waiting() -> None:
    def check() -> None:
        raise QuorumError("the engine ended")

    grid = LoopGrid({1: echo("Aare")})
    fleet = FlowerFleet(grid)
    fleet.sites()
    grid.nodes[1].silent = True
    with pytest.raises(QuorumError, match="the engine ended"):
        list(FlowerFleet.exchange(_with_check(fleet, check), INSTRUCTIONS, ["Aare"], None))


def _with_check(fleet: FlowerFleet, check: object) -> FlowerFleet:
    fleet._check = check  # type: ignore[assignment]
    return fleet
