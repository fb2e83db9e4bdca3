"""The real Prometheus scrapes a federation while it trains; an alert fires when a site falls silent, and clears."""

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from fedseg.coordinator.exporter import CATALOGUE, serve
from fedseg.federated.messages import SiteFailure
from fedseg.site.supernode import free_port
from tests.federated.toys import changed_fleet, run_toy, toy_experiment

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus (Debian's package) is not installed"),
]

ROOT = Path(__file__).parents[2]
SILENT = range(4, 12)
"""Rounds in which site C gives no update."""
ROUNDS, PAUSE = 24, 0.4


class Prometheus:
    """Prometheus with the project's own rules, looking twice a second."""

    def __init__(self, folder: Path, target: int) -> None:
        self.port = free_port()
        text = (ROOT / "deploy/prometheus/prometheus.yml").read_text()
        text = re.sub(r"_interval: 15s", "_interval: 500ms", text).replace("127.0.0.1:9464", f"127.0.0.1:{target}")
        (folder / "prometheus.yml").write_text(text)
        shutil.copy(ROOT / "deploy/prometheus/rules.yml", folder)
        command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn"]
        with (folder / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, f"--web.listen-address=127.0.0.1:{self.port}"], cwd=folder, stdout=log, stderr=log
            )

    def ask(self, path: str, **parameters: str) -> dict:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def scrapes(self) -> bool:
        """Whether it has found its target."""
        try:
            return any(sample["value"][1] == "1" for sample in self.ask("query", query="up")["result"])
        except OSError:
            return False

    def firing(self) -> set[tuple[str, str]]:
        try:
            alerts = self.ask("alerts")["alerts"]
        except OSError:
            return set()
        return {(a["labels"]["alertname"], a["labels"].get("site", "")) for a in alerts if a["state"] == "firing"}

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.mark.timeout(120)
def test_a_silent_site_raises_an_alert_that_clears_when_it_is_back(tmp_path):
    def change(site, instructions, answer):
        time.sleep(PAUSE / 3)
        silent = site == "C" and instructions.server_round in SILENT and instructions.train
        return SiteFailure("C", instructions.server_round, "failed", "NodeUnavailable") if silent else answer

    experiment = toy_experiment(rounds=ROUNDS, min_sites=2)
    training = threading.Thread(target=run_toy, args=(experiment, tmp_path / "run", changed_fleet(change)))
    server, thread = serve(tmp_path / "run")
    prometheus = Prometheus(tmp_path, server.server_port)
    seen = []
    try:
        end = time.monotonic() + 60
        while not prometheus.scrapes():
            assert prometheus.process.poll() is None, (tmp_path / "prometheus.log").read_text()
            assert time.monotonic() < end, (tmp_path / "prometheus.log").read_text()
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
                found = prometheus.ask("query", query=f"last_over_time({series.exposed_name}[5m])")["result"]
                assert found, series.exposed_name
        recorded = re.findall(r"record: (\S+)", (ROOT / "deploy/prometheus/rules.yml").read_text())
        assert all(prometheus.ask("query", query=name)["result"] for name in recorded)
    finally:
        training.join(60)
        prometheus.close()
        server.shutdown()
        server.server_close()
        thread.join(10)
