"""Flower's simulation engine gives the plain loop's numbers, and ends when it should."""

import importlib.util
import logging
import os
from pathlib import Path

import pytest
import torch

from fedseg.engines import ray_fleet
from fedseg.errors import ConfigError, QuorumError
from fedseg.federated.driver import run_federation
from fedseg.federated.networks import start_state
from fedseg.federated.store import RunStore
from fedseg.federated.weights import digest
from fedseg.flower import FlowerFleet
from fedseg.simulation import Machine, _fleet
from fedseg.site.config import SiteConfig, load_site
from tests.apps.hospitals import run_as_loop, tiny_experiment, write_hospitals

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs pip install "fedseg[ray]"')


@needs_ray
@pytest.mark.timeout(200)
def test_actors_give_the_weights_of_a_plain_loop_to_the_last_bit_and_an_error_ends_them(tmp_path: Path) -> None:
    import ray

    torch.set_num_threads(1)
    files, experiment = write_hospitals(tmp_path), tiny_experiment()
    (tmp_path / "Loire" / "data" / "dataset.json").write_text("{")
    expected = run_as_loop(experiment, files, tmp_path / "loop")
    store = RunStore(tmp_path / "ray")
    sites = [load_site(path) for path in files.values()]
    before, level = dict(os.environ), logging.getLogger("flwr").level
    with pytest.raises(ZeroDivisionError), _fleet(sites, (), Machine(workers=2, engine="flower")) as fleet:
        assert isinstance(fleet, FlowerFleet)
        state = run_federation(experiment, fleet, store, lambda: start_state(experiment))
        raise ZeroDivisionError
    assert not ray.is_initialized()
    assert dict(os.environ) == before
    assert logging.getLogger("flwr").level == level
    assert digest(state.weights) == digest(expected.weights)
    query = "SELECT site, status, reason FROM updates WHERE server_round = 2 ORDER BY site"
    assert [tuple(row.values()) for row in store.rows(query)] == [
        ("Aare", "accepted", None),
        ("Elbe", "accepted", None),
        ("Loire", "failed", "DataError"),
    ]


@needs_ray
@pytest.mark.timeout(120)
def test_an_engine_that_cannot_start_says_why() -> None:
    sites = [SiteConfig(name="Aare", data="/nowhere", cache="/nowhere", device="cuda:0")]
    with pytest.raises(QuorumError, match=r"engine ended: .*ActorPool is empty"), ray_fleet(sites, 1) as fleet:
        fleet.sites()


def test_a_machine_without_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "fedseg\[ray\]"'), ray_fleet([], 1):
        pass
