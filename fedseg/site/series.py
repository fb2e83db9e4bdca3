"""A site's own Prometheus series: for the hospital that runs it, never for the coordinator.

The service makes the text, since only it knows, and gives it to whoever asks at its socket; `fedseg.site.scrape` answers
Prometheus. Labels are names of structures and codes from fixed lists, never a case, a path or an error's text.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from fedseg.data.reasons import Reason
from fedseg.series import Kind, Samples, Series, markdown_table
from fedseg.site.gpus import gpus
from fedseg.site.scrape import UP
from fedseg.site.tally import DECISIONS, ERRORS, KINDS, OTHER, RULES, Tally, in_full
from fedseg.site.wire.site_pb2 import Description

PREFIX = "fedseg_site_service_"
PHASES = ("checking", "preparing", "looking", "scoring", "training")
"""Of a request, as `Progress` names them."""


def _series(name: str, kind: Kind, labels: tuple[str, ...], text: str) -> Series:
    return Series(f"{PREFIX}{name}", kind, ("site", *labels), text)


CATALOGUE: dict[str, Series] = {
    series.name: series
    for series in (
        UP,
        _series("info", "gauge", ("release", "device"), "Always 1; says what runs where."),
        _series("started_timestamp_seconds", "gauge", (), "When the service was started, in seconds since 1970."),
        _series("busy", "gauge", (), "1 while a request is being answered."),
        _series("phase", "gauge", ("phase",), "1 for what the request is at now; 0 for all else."),
        _series("progress_ratio", "gauge", (), "How much of that phase is done; 0 while idle."),
        _series("server_round", "gauge", (), "Round of the last request."),
        _series(
            "last_round_timestamp_seconds", "gauge", (), "When a request was last answered, in seconds since 1970."
        ),
        _series("last_request_seconds", "gauge", (), "Duration of the last request, answered or not."),
        _series("requests", "counter", ("kind", "decided"), "Requests by what was asked for and what became of them."),
        _series("policy_refusals", "counter", ("rule",), "Requests that the policy refused, by rule."),
        _series("failures", "counter", ("error",), "Requests that failed, by the error's class."),
        _series("training_loss", "gauge", (), "Mean loss of the last training."),
        _series("dice_mean", "gauge", (), "Mean over structures of the last scores' Dice."),
        _series("dice", "gauge", ("structure",), "Mean Dice of the validation cases, when they were last scored."),
        _series("cases", "gauge", ("part",), "Usable cases of the last request: training, validation."),
        _series("quarantined_cases", "gauge", ("reason",), "Cases of the last request that could not be used."),
        _series("input_drift_alarm", "gauge", (), "1 if the training images are unlike those of the federation."),
        _series("unusual_cases", "gauge", (), "Training cases that are unlike those of the federation."),
        _series("epochs", "counter", (), "Passes over the training cases that were finished and answered."),
        _series("steps", "counter", (), "Steps of training that were finished and answered."),
        _series("training_images_per_second", "gauge", (), "Patches per second of the last training."),
        _series("data_wait_ratio", "gauge", (), "Share of the last training that was spent waiting for patches."),
        _series("cache_hits", "counter", (), "Cases that were found prepared."),
        _series("cache_misses", "counter", (), "Cases that had to be prepared."),
        _series("received_bytes", "counter", (), "Bytes of requests."),
        _series("sent_bytes", "counter", (), "Bytes of answers."),
        _series("audit_entries", "counter", (), "Entries of the audit log."),
        _series("audit_failures", "counter", (), "Entries that could not be written since the service was started."),
        _series(
            "state_free_bytes", "gauge", (), "Room left on the disk of the state folder, which holds the audit log."
        ),
        _series("state_size_bytes", "gauge", (), "Size of that disk."),
        _series("memory_bytes", "gauge", (), "Resident memory of the service's process."),
        _series("gpu_memory_used_bytes", "gauge", ("gpu",), "Memory in use on the card, by whomever."),
        _series("gpu_memory_size_bytes", "gauge", ("gpu",), "Memory of the card."),
        _series("gpu_utilisation_ratio", "gauge", ("gpu",), "Share of the last moments in which the card computed."),
    )
}
"""Every series of a site; docs/hospital.md is made from it."""


def catalogue_table() -> str:
    """The catalogue as a Markdown table."""
    return markdown_table(CATALOGUE.values())


def exposition(now: Description, tally: Tally, state: Path) -> str:
    """All series in Prometheus' text format, but for the one that says whether the service answers.

    Args:
        now: what the service is doing.
        tally: what it has done.
        state: its state folder.
    """
    registry = CollectorRegistry()
    registry.register(_Once(now, tally, state))
    return generate_latest(registry).decode()


class _Once(Collector):
    def __init__(self, now: Description, tally: Tally, state: Path) -> None:
        self._samples, self._site = Samples(CATALOGUE), now.site
        self._of_now(now)
        with tally.lock:
            self._of_requests(tally)
            self._of_training(tally)
        self._of_machine(state)

    def collect(self) -> Iterator[Metric]:
        yield from self._samples.families()

    def _add(self, name: str, value: float | None, *labels: str) -> None:
        self._samples.add(f"{PREFIX}{name}", value, self._site, *labels)

    def _of_now(self, now: Description) -> None:
        busy, progress = now.state == "busy", now.progress
        self._add("info", 1, now.version, now.device)
        self._add("started_timestamp_seconds", now.started)
        self._add("busy", float(busy))
        for phase in PHASES:
            self._add("phase", float(busy and progress.phase == phase), phase)
        self._add("progress_ratio", progress.done / progress.total if busy and progress.total else 0.0)

    def _of_requests(self, tally: Tally) -> None:
        self._add("server_round", tally.server_round)
        self._add("last_round_timestamp_seconds", tally.last.get("answered"))
        self._add("last_request_seconds", tally.last.get("seconds"))
        for kind in KINDS:
            for decided in DECISIONS:
                self._add("requests", tally.requests[kind, decided], kind, decided)
        for rule, count in in_full(tally.refusals, RULES):
            self._add("policy_refusals", count, rule)
        for error, count in in_full(tally.failures, ERRORS):
            self._add("failures", count, error)
        for name in ("received_bytes", "sent_bytes"):
            self._add(name, tally.counts[name])
        self._add("audit_entries", tally.entries)
        self._add("audit_failures", tally.counts["unwritten"])

    def _of_training(self, tally: Tally) -> None:
        self._add("training_loss", tally.last.get("loss"))
        self._add("dice_mean", sum(tally.dice.values()) / len(tally.dice) if tally.dice else None)
        for structure, dice in tally.dice.items():
            self._add("dice", dice, structure)
        for part in ("training", "validation"):
            self._add("cases", tally.last.get(f"{part}_cases"), part)
        if tally.quarantined is not None:
            for reason, count in in_full(tally.quarantined, (*Reason, OTHER)):
                self._add("quarantined_cases", count, reason)
        self._add("input_drift_alarm", tally.last.get("drift_alarm", 0.0))
        self._add("unusual_cases", tally.last.get("unusual_cases", 0.0))
        self._add("epochs", tally.counts["epochs"])
        self._add("steps", tally.counts["steps"])
        self._add("training_images_per_second", tally.last.get("images_per_second"))
        self._add("data_wait_ratio", tally.last.get("wait_ratio"))
        self._add("cache_hits", tally.counts["hit"])
        self._add("cache_misses", tally.counts["miss"])

    def _of_machine(self, state: Path) -> None:
        with suppress(OSError):
            disk = shutil.disk_usage(state)
            self._add("state_free_bytes", disk.free)
            self._add("state_size_bytes", disk.total)
        with suppress(OSError):  # elsewhere than on Linux
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self._add("memory_bytes", pages * os.sysconf("SC_PAGE_SIZE"))
        for gpu in gpus():
            self._add("gpu_memory_used_bytes", gpu.memory_used, str(gpu.index))
            self._add("gpu_memory_size_bytes", gpu.memory_size, str(gpu.index))
            self._add("gpu_utilisation_ratio", gpu.utilisation, str(gpu.index))
