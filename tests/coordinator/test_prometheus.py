"""The real Prometheus scrapes a federation while it trains; an alert fires when a site falls silent, and clears."""

import shutil
import threading
import time

import pytest

from fedseg.coordinator.exporter import CATALOGUE, serve
from fedseg.federated.messages import SiteFailure
from tests.federated.toys import changed_fleet, run_toy, toy_experiment
from tests.prometheus import Prometheus, rule_metrics

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus (Debian's package) is not installed"),
]

SILENT = range(4, 12)
"""Rounds in which site C gives no update."""
ROUNDS, PAUSE = 24, 0.4


@pytest.mark.timeout(120)
def test_a_silent_site_raises_an_alert_that_clears_when_it_is_back(tmp_path):
    def change(site, instructions, answer):
        time.sleep(PAUSE / 3)
        silent = site == "C" and instructions.server_round in SILENT and instructions.train
        return SiteFailure("C", instructions.server_round, "failed", "NodeUnavailable") if silent else answer

    experiment = toy_experiment(rounds=ROUNDS, min_sites=2)
    training = threading.Thread(target=run_toy, args=(experiment, tmp_path / "run", changed_fleet(change)))
    server, thread = serve(tmp_path / "run")
    prometheus = Prometheus(tmp_path, {"fedseg-coordinator": [server.server_port]})
    seen = []
    try:
        end = time.monotonic() + 60
        while not prometheus.scrapes():
            assert time.monotonic() < end, prometheus.log()
            time.sleep(0.1)
        training.start()
        while training.is_alive() and time.monotonic() < end:
            seen.append(("FedsegSiteSilent", "C") in prometheus.firing())
            time.sleep(0.1)
        training.join(60)
        assert any(seen)
        assert not seen[0]
        assert not seen[-1], "it has cleared"
        assert not {name for name, _ in prometheus.firing()} - {"FedsegSiteSilent"}
        for series in CATALOGUE.values():
            if "run" in series.labels and series.name != "fedseg_site_training_seconds":  # toys take no time
                assert prometheus.ever(series.exposed_name), series.exposed_name
        assert all(prometheus.ever(name) for name in rule_metrics("rules.yml") if name.startswith("fedseg:"))
    finally:
        training.join(60)
        prometheus.close()
        server.shutdown()
        server.server_close()
        thread.join(10)
