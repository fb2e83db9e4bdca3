"""From the run store to a writer, once or until the run is finished."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedseg.coordinator.history import RoundStory, rounds_of
from fedseg.coordinator.state import Store, reader
from fedseg.coordinator.writers.writer import FAILURES, RoundFacts, RunFacts, Writer
from fedseg.errors import StoreError

POLL_SECONDS = 2.0
_ODD = re.compile(r"[^-/\w.]")
"""What a structure may have in its name, and the programs' names may not."""


def copy_run(
    directory: Path, run: str, writer: Writer, *, follow: bool = False, pause: Callable[[float], None] = time.sleep
) -> int:
    """Write what is known of a run and not written yet.

    Args:
        directory: run directory.
        run: run in it.
        writer: where to; it is closed in any case.
        follow: go on until the run is finished; it need not have begun.
        pause: waits so many seconds.

    Returns:
        The number of values that were new.

    Raises:
        StoreError: there is no such run, or what the writer says.
    """
    try:
        while follow and _facts(directory, run) is None:
            pause(POLL_SECONDS)
        facts = _facts(directory, run)
        if facts is None:
            rounds_of(directory, run)  # says which runs there are
            raise StoreError(f"{directory}: run {run!r} is being made; try again")
        known, new = set(writer.begin(facts)), 0
        while True:
            facts = _facts(directory, run) or facts  # before the rounds: what is finished has them all
            for whole in _rounds(directory, run):
                part = _without(whole, known)
                if part.values or part.failures:
                    writer.round(part)
                    known |= _names(part)
                    new += len(part.values)
            if facts.finished is not None:
                writer.end(facts)
            if facts.finished is not None or not follow:
                return new
            pause(POLL_SECONDS)
    except OSError as error:
        raise StoreError(f"{error.filename}: cannot be written: {error.strerror}; choose another --output") from error
    finally:
        writer.close()


def _facts(directory: Path, run: str) -> RunFacts | None:
    with reader(directory) as store:
        found = store("SELECT * FROM runs WHERE run = ?", run)
    if not found:
        return None
    row = found[0]
    identity = hashlib.sha256(f"{run} {row['digest']} {row['started']!r}".encode()).hexdigest()[:12]
    experiment = json.loads(row["experiment"])
    return RunFacts(
        run=run,
        study=row["name"],
        identity=identity,
        started=row["started"],
        finished=row["finished"],
        parameters=dict(flatten(experiment)),
        experiment=json.dumps(experiment, indent=1),
    )


def flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float | bool]]:
    """The leaves of nested tables with dotted names; a list is one leaf."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str | int | float) else json.dumps(value)


def _rounds(directory: Path, run: str) -> Iterator[RoundFacts]:
    stories = rounds_of(directory, run)
    with reader(directory) as store:
        for story in stories:
            number = story.server_round
            values = _of_round(story) | _of_sites(store, run, number) | _scores(store, run, number)
            plain = {_ODD.sub("_", name): value for name, value in values.items()}
            yield RoundFacts(number, story.finished, plain, "\n".join(story.failures))


def _scores(store: Store, run: str, number: int) -> dict[str, float]:
    """Of the weights after the round."""
    rows = store("SELECT site, name, value FROM metrics WHERE run = ? AND server_round = ?", run, number)
    values = {f"score/{row['name']}/{row['site']}": float(row["value"]) for row in rows}
    dice = [row["value"] for row in rows if row["name"] == "dice"]
    return values | ({"dice/mean": sum(dice) / len(dice), "dice/worst": min(dice)} if dice else {})


def _of_round(story: RoundStory) -> dict[str, float]:
    values = {
        "round/seconds": story.seconds,
        "round/attempts": story.attempts,
        "round/sites-asked": story.asked,
        "round/sites-accepted": story.accepted,
        "round/sites-failed": len(story.failures),
        "round/cases": story.cases,
        "round/megabytes": story.megabytes,
    }
    return values | ({"loss/mean": story.loss} if story.loss is not None else {})


def _of_sites(store: Store, run: str, number: int) -> dict[str, float]:
    values: dict[str, float] = {}
    query = "SELECT * FROM updates WHERE run = ? AND server_round = ? AND status = 'accepted'"
    for row in map(dict, store(query, run, number)):
        site, training = row["site"], json.loads(row["training"] or "{}")
        numbers = {name: row.get(name) for name in ("norm", "cosine", "seconds")}  # old stores have no cosine
        numbers |= {"cases": row["num_cases"], "megabytes": (row["bytes"] or 0) / 1e6}
        numbers |= {"loss" if name == "loss" else f"training/{name}": value for name, value in training.items()}
        values |= {f"{name}/{site}": float(value) for name, value in numbers.items() if isinstance(value, int | float)}
    return values


def _without(facts: RoundFacts, known: set[tuple[str, int]]) -> RoundFacts:
    number = facts.server_round
    values = {name: value for name, value in facts.values.items() if (name, number) not in known}
    return RoundFacts(number, facts.time, values, "" if (FAILURES, number) in known else facts.failures)


def _names(facts: RoundFacts) -> set[tuple[str, int]]:
    texts = {FAILURES} if facts.failures else set()
    return {(name, facts.server_round) for name in facts.values.keys() | texts}
