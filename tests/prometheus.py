"""The real Prometheus, with the project's own rules."""

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedseg.site.supernode import free_port

ROOT = Path(__file__).parents[1]
DEPLOYED = ROOT / "deploy/prometheus"


class Prometheus:
    """Prometheus, ready when `scrapes` says so.

    Args:
        folder: for its configuration and its data.
        jobs: what it scrapes: by name of the job, the targets' ports, or a whole scrape configuration.
        rules: files of deploy/prometheus.
        every: how often it looks.
        lasting: how long something must last before an alert fires; absent: as long as the rules say.
    """

    def __init__(
        self,
        folder: Path,
        jobs: Mapping[str, Sequence[int] | dict[str, Any]],
        rules: Sequence[str] = ("rules.yml",),
        every: str = "500ms",
        lasting: str | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port, self.folder = free_port(), folder
        configuration = {
            "global": {"scrape_interval": every, "evaluation_interval": every},
            "rule_files": list(rules),
            "scrape_configs": [
                {"job_name": name}
                | (
                    job
                    if isinstance(job, dict)
                    else {"static_configs": [{"targets": [f"127.0.0.1:{port}" for port in job]}]}
                )
                for name, job in jobs.items()
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        for name in rules:
            text = (DEPLOYED / name).read_text()
            (folder / name).write_text(
                text if lasting is None else re.sub(r"(?m)^(\s+for:) \S+$", rf"\1 {lasting}", text)
            )
        command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn"]
        with (folder / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, f"--web.listen-address=127.0.0.1:{self.port}"], cwd=folder, stdout=log, stderr=log
            )
        self.begun = time.time()

    def ask(self, path: str, **parameters: object) -> Any:
        """Its HTTP API."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, query: str) -> list[dict[str, Any]]:
        """Samples of now; none while it is starting."""
        try:
            return list(self.ask("query", query=query)["result"])
        except OSError:
            assert self.process.poll() is None, self.log()
            return []

    def ever(self, query: str) -> list[dict[str, Any]]:
        """Series that a query has had since Prometheus was started."""
        return list(self.ask("query_range", query=query, start=self.begun, end=time.time(), step=1)["result"])

    def scrapes(self, count: int = 1) -> bool:
        """Whether so many targets answer."""
        return sum(sample["value"][1] == "1" for sample in self.query("up")) >= count

    def firing(self) -> set[tuple[str, str]]:
        """Alerts that fire, and the sites that they are about."""
        try:
            alerts = self.ask("alerts")["alerts"]
        except OSError:
            return set()
        return {(a["labels"]["alertname"], a["labels"].get("site", "")) for a in alerts if a["state"] == "firing"}

    def log(self) -> str:
        """What it has complained about."""
        return (self.folder / "prometheus.log").read_text()

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(20)


def rule_metrics(name: str) -> dict[str, set[str]]:
    """The metrics that each rule of a file in deploy/prometheus asks for, by the rule's name."""
    groups = yaml.safe_load((DEPLOYED / name).read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    return {rule.get("alert") or rule["record"]: set(re.findall(r"\bfedseg[_:][\w:]*", rule["expr"])) for rule in rules}


def panel_queries(dashboard: str, **variables: str) -> Iterator[tuple[str, str]]:
    """Title and query of every panel of a dashboard in deploy/grafana, its variables filled in."""
    document = json.loads((ROOT / "deploy/grafana/dashboards" / dashboard).read_text())
    for panel in document["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            for variable, value in (variables | {"__rate_interval": "1m"}).items():
                query = query.replace(f"${{{variable}}}", value).replace(f"${variable}", value)
            assert "$" not in query, query
            yield panel["title"], query
