"""A study's rounds as Prometheus series, read from the run store whenever somebody asks.

Nothing is counted in memory: a process that was killed shows the same series when it is started again, and a finished run goes
on showing how it ended. Labels are names of runs, sites, structures and reason codes; there are never more of them than the
study has.
"""

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args, get_type_hints

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from fedseg import __version__
from fedseg.coordinator.page import places
from fedseg.coordinator.state import Store, is_locked, reader
from fedseg.coordinator.web import watching_app
from fedseg.endpoint import Endpoint, listen
from fedseg.federated.messages import SiteFailure
from fedseg.federated.phases import PHASES
from fedseg.federated.waiting import read_waiting
from fedseg.series import Samples, Series, markdown_table

CATALOGUE: dict[str, Series] = {
    series.name: series
    for series in (
        Series(
            "fedseg_run_info", "gauge", ("run", "study", "model", "digest", "version"), "Always 1; says what is run."
        ),
        Series("fedseg_rounds_planned", "gauge", ("run",), "Rounds of the experiment."),
        Series("fedseg_rounds_finished", "gauge", ("run",), "Last committed round; 0 are the initial weights."),
        Series("fedseg_run_finished", "gauge", ("run",), "1 when the closing evaluation is in."),
        Series("fedseg_run_started_timestamp_seconds", "gauge", ("run",), "When the run began, in seconds since 1970."),
        Series(
            "fedseg_run_resumes", "counter", ("run",), "How often the run went on after it had ended before its time."
        ),
        Series("fedseg_round_repeats", "counter", ("run",), "Attempts at rounds that missed the quorum."),
        Series("fedseg_round_current", "gauge", ("run",), "Round that is being run; 0 when nobody runs the run."),
        Series("fedseg_round_phase", "gauge", ("run", "phase"), "1 for what the round is doing now; 0 for all else."),
        Series(
            "fedseg_round_duration_seconds",
            "gauge",
            ("run",),
            "Duration of the last round, from the first request of its last attempt to the new weights.",
        ),
        Series(
            "fedseg_round_phase_seconds",
            "gauge",
            ("run", "phase"),
            "Duration of each phase of the last round; broadcast, wait and aggregate add up to the round.",
        ),
        Series("fedseg_checkpoint_timestamp_seconds", "gauge", ("run",), "When the last round was committed."),
        Series("fedseg_sites_asked", "gauge", ("run",), "Sites that were asked in the last round."),
        Series("fedseg_sites_accepted", "gauge", ("run",), "Sites whose update went into the last round."),
        Series("fedseg_sites_required", "gauge", ("run",), "Quorum of the experiment."),
        Series(
            "fedseg_site_answers", "counter", ("run", "site", "status"), "Answers of a site by what became of them."
        ),
        Series(
            "fedseg_site_failures",
            "counter",
            ("run", "site", "status", "reason"),
            "Answers without an update, by reason.",
        ),
        Series("fedseg_site_last_round", "gauge", ("run", "site"), "Last round with an update of the site."),
        Series("fedseg_site_last_update_timestamp_seconds", "gauge", ("run", "site"), "When that round was committed."),
        Series("fedseg_site_cases", "gauge", ("run", "site"), "Training cases in the site's last update."),
        Series(
            "fedseg_site_quarantined_cases", "gauge", ("run", "site", "reason"), "Cases set aside in its last update."
        ),
        Series("fedseg_site_update_norm", "gauge", ("run", "site"), "L2 norm of the site's last update."),
        Series(
            "fedseg_site_update_cosine",
            "gauge",
            ("run", "site"),
            "Cosine of the angle between the site's last update and the joint one, to within about 0.03.",
        ),
        Series("fedseg_site_update_bytes", "gauge", ("run", "site"), "Bytes of arrays in the site's last update."),
        Series("fedseg_site_received_bytes", "counter", ("run", "site"), "Bytes of arrays that came from the site."),
        Series("fedseg_site_sent_bytes", "counter", ("run", "site"), "Bytes of arrays in the requests to the site."),
        Series("fedseg_site_answer_seconds", "gauge", ("run", "site"), "From the request to the site's last update."),
        Series("fedseg_site_training_seconds", "gauge", ("run", "site"), "Training time in the site's last update."),
        Series("fedseg_site_training_loss", "gauge", ("run", "site"), "Mean training loss in the site's last update."),
        Series(
            "fedseg_site_data_changes", "counter", ("run", "site"), "How often the site's data manifest has changed."
        ),
        Series(
            "fedseg_site_score",
            "gauge",
            ("run", "site", "metric"),
            "Mean over the site's validation cases, newest weights.",
        ),
        Series("fedseg_score_mean", "gauge", ("run", "metric"), "Mean of the sites' means, newest scored weights."),
        Series("fedseg_score_worst", "gauge", ("run", "metric"), "Worst site's mean, newest scored weights."),
        Series("fedseg_score_round", "gauge", ("run",), "Round of the newest scored weights."),
        Series("fedseg_dice_best", "gauge", ("run",), "Best mean Dice of all scored rounds."),
        Series(
            "fedseg_dice_improvement",
            "gauge",
            ("run",),
            "Newest mean Dice minus the best before it; below 0 it has become worse.",
        ),
        Series(
            "fedseg_rounds_since_best", "gauge", ("run",), "Rounds between the best mean Dice and the newest score."
        ),
        Series("fedseg_site_connected", "gauge", ("site",), "1 if the site's gate has been heard of lately."),
        Series("fedseg_restarts", "counter", ("program",), "How often the supervisor has started a program again."),
        Series(
            "fedseg_certificate_expiry_timestamp_seconds",
            "gauge",
            ("certificate",),
            "When it expires; a site's by its name.",
        ),
        Series("fedseg_state_free_bytes", "gauge", (), "Room left on the disk of the state folder."),
        Series("fedseg_state_size_bytes", "gauge", (), "Size of that disk."),
    )
}
"""Every series of the coordinator; docs/metrics.md is made from it."""

STATUSES = ("accepted", *get_args(get_type_hints(SiteFailure)["kind"]))
"""What may become of an answer."""
_HIGHER_IS_BETTER = ("dice", "surface_dice")


def catalogue_table() -> str:
    """The catalogue as a Markdown table."""
    return markdown_table(CATALOGUE.values())


class RunCollector(Collector):
    """Reads a run directory at each scrape.

    Args:
        directory: of a run store, or a study's state folder; it may be empty for now.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterator[Metric]:
        """All series of all runs in the directory."""
        samples = Samples(CATALOGUE)
        folder, _ = places(self._directory)
        with reader(folder) as store:
            for run in store("SELECT * FROM runs ORDER BY run"):
                _of_run(samples, store, run)
                _of_now(samples, store, run, folder)
        yield from samples.families()


def _of_run(samples: Samples, store: Store, run: sqlite3.Row) -> None:
    name, experiment = run["run"], json.loads(run["experiment"])
    federation = experiment["federation"]
    samples.add("fedseg_run_info", 1, name, run["name"], experiment["model"]["name"], run["digest"][:16], __version__)
    samples.add("fedseg_rounds_planned", federation["rounds"], name)
    samples.add("fedseg_sites_required", federation["min_sites"], name)
    samples.add("fedseg_run_finished", float(run["finished"] is not None), name)
    samples.add("fedseg_run_started_timestamp_seconds", run["started"], name)
    samples.add("fedseg_run_resumes", run["resumed"], name)
    repeated = store("SELECT count(*) AS n FROM events WHERE run = ? AND kind = 'repeated'", name)
    samples.add("fedseg_round_repeats", repeated[0]["n"] if repeated else 0, name)
    if last := store(_LAST_ROUND, name):
        number = last[0]["server_round"]
        samples.add("fedseg_rounds_finished", number, name)
        samples.add("fedseg_checkpoint_timestamp_seconds", last[0]["finished"], name)
        samples.add("fedseg_round_duration_seconds", last[0]["seconds"], name)
        samples.add("fedseg_sites_asked", len(json.loads(last[0]["asked"])), name)
        accepted = "SELECT count(*) AS n FROM updates WHERE run = ? AND server_round = ? AND status = 'accepted'"
        samples.add("fedseg_sites_accepted", store(accepted, name, number)[0]["n"], name)
        for row in store("SELECT * FROM phases WHERE run = ? AND server_round = ?", name, number):
            samples.add("fedseg_round_phase_seconds", row["seconds"], name, row["phase"])
    _of_answers(samples, store, name)
    _of_updates(samples, store, name)
    _of_scores(samples, store, name)


_LAST_ROUND = "SELECT * FROM rounds WHERE run = ? ORDER BY server_round DESC LIMIT 1"


def _of_now(samples: Samples, store: Store, run: sqlite3.Row, folder: Path) -> None:
    """What the process is doing that runs the run, if there is one."""
    name, current, phase = run["run"], 0, None
    if run["finished"] is None and is_locked(folder / f".{name}.lock"):
        if waiting := read_waiting(folder, name):
            current, phase = waiting.server_round, waiting.phase
        elif last := store(_LAST_ROUND, name):
            current = min(last[0]["server_round"] + 1, json.loads(run["experiment"])["federation"]["rounds"])
    samples.add("fedseg_round_current", current, name)
    for each in PHASES:
        samples.add("fedseg_round_phase", float(each == phase), name, each)


def _of_answers(samples: Samples, store: Store, run: str) -> None:
    answers = "SELECT site, status, count(*) AS n FROM updates WHERE run = ? GROUP BY site, status"
    counts = {(row["site"], row["status"]): row["n"] for row in store(answers, run)}
    sites = sorted({site for site, _ in counts})
    for site in sites:
        for status in STATUSES:  # zeros too, or the first refusal would not look like an increase
            samples.add("fedseg_site_answers", counts.get((site, status), 0), run, site, status)
    failures = (
        "SELECT site, status, reason, count(*) AS n FROM updates WHERE run = ? AND status != 'accepted' "
        "GROUP BY site, status, reason"
    )
    for row in store(failures, run):
        samples.add("fedseg_site_failures", row["n"], run, row["site"], row["status"], row["reason"] or "")
    changes = "SELECT site, count(*) AS n FROM events WHERE run = ? AND kind = 'data-changed' GROUP BY site"
    changed = {row["site"]: row["n"] for row in store(changes, run)}
    for site in sites:
        samples.add("fedseg_site_data_changes", changed.get(site, 0), run, site)


def _of_updates(samples: Samples, store: Store, run: str) -> None:
    newest = (
        "SELECT u.*, r.finished AS committed FROM updates u JOIN rounds r USING (run, server_round) "
        "WHERE u.run = ? AND u.status = 'accepted' AND u.server_round = "
        "(SELECT max(server_round) FROM updates WHERE run = u.run AND site = u.site AND status = 'accepted')"
    )
    for row in store(newest, run):
        labels = (run, row["site"])
        training = json.loads(row["training"])
        samples.add("fedseg_site_last_round", row["server_round"], *labels)
        samples.add("fedseg_site_last_update_timestamp_seconds", row["committed"], *labels)
        samples.add("fedseg_site_cases", row["num_cases"], *labels)
        samples.add("fedseg_site_update_norm", row["norm"], *labels)
        samples.add("fedseg_site_update_cosine", dict(row).get("cosine"), *labels)  # older stores have none
        samples.add("fedseg_site_update_bytes", row["bytes"], *labels)
        samples.add("fedseg_site_answer_seconds", row["seconds"], *labels)
        samples.add("fedseg_site_training_seconds", training.get("seconds"), *labels)
        samples.add("fedseg_site_training_loss", training.get("loss"), *labels)
        for reason, count in json.loads(row["quarantined"]).items():
            samples.add("fedseg_site_quarantined_cases", count, *labels, reason)
    received = "SELECT site, sum(bytes) AS n FROM updates WHERE run = ? AND status = 'accepted' GROUP BY site"
    for row in store(received, run):
        samples.add("fedseg_site_received_bytes", row["n"], run, row["site"])
    for row in store("SELECT site, sum(bytes) AS n FROM requests WHERE run = ? GROUP BY site", run):
        samples.add("fedseg_site_sent_bytes", row["n"], run, row["site"])


def _of_scores(samples: Samples, store: Store, run: str) -> None:
    scores = store("SELECT * FROM metrics WHERE run = ? ORDER BY server_round", run)
    if not scores:
        return
    newest = scores[-1]["server_round"]
    samples.add("fedseg_score_round", newest, run)
    by_metric: dict[str, list[float]] = {}
    by_round: dict[int, list[float]] = {}
    for row in scores:
        if row["name"] == "dice":
            by_round.setdefault(row["server_round"], []).append(row["value"])
        if row["server_round"] == newest:
            samples.add("fedseg_site_score", row["value"], run, row["site"], row["name"])
            by_metric.setdefault(row["name"], []).append(row["value"])
    for metric, values in by_metric.items():
        worst = min if metric.split("/")[0] in _HIGHER_IS_BETTER else max
        samples.add("fedseg_score_mean", sum(values) / len(values), run, metric)
        samples.add("fedseg_score_worst", worst(values), run, metric)
    if by_round:
        means = {number: sum(values) / len(values) for number, values in by_round.items()}
        best = max(means, key=lambda number: means[number])
        samples.add("fedseg_dice_best", means[best], run)
        samples.add("fedseg_rounds_since_best", newest - best, run)
        *before, latest = means.values()
        samples.add("fedseg_dice_improvement", latest - max(before) if before else None, run)


def serve(
    directory: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    more: Sequence[Collector] = (),
    web_config: Path | None = None,
) -> tuple[Endpoint, threading.Thread]:
    """Answer scrapes, and show the watching page, in a thread of its own.

    Args:
        directory: a run directory, or a study's state folder.
        host: address to listen on, see `fedseg.endpoint.listen`.
        port: 0: any; the server that is returned knows it.
        more: further series.
        web_config: how to ask who is there.

    Raises:
        ConfigError: the port is in use.
    """
    registry = CollectorRegistry()
    for collector in (RunCollector(directory), *more):
        registry.register(collector)
    return listen(watching_app(directory, registry), host, port, web_config)
