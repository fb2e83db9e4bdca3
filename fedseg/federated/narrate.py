"""Tells the log how a federation goes: a line for each answer and each round."""

import logging

from fedseg.federated.driver import Event
from fedseg.federated.messages import SiteFailure

log = logging.getLogger(__name__)


def narrate(event: Event) -> None:
    """Log what has happened; nothing of it is of a single case."""
    number, answer, report = event.server_round, event.answer, event.report
    if answer is not None:
        about = {"round": number, "site": answer.site}
        if isinstance(answer, SiteFailure):
            log.warning("round %d: %s %s (%s)", number, answer.site, answer.kind, answer.reason, extra=about)
        else:
            told = (number, answer.site, answer.num_cases, answer.seconds)
            log.info("round %d: %s accepted, %d cases, %.1f s", *told, extra=about)
    if report is not None:
        log.info(
            "round %d: %d of %d sites in %.1f s, %d cases%s",
            number,
            len(report.accepted),
            len(report.asked),
            report.seconds,
            sum(update.num_cases for update in report.accepted),
            _dice(event, "received"),
            extra={"round": number},
        )
    if event.kind == "repeat":
        log.warning("round %d: too few updates; it is repeated", number, extra={"round": number})
    if event.kind == "finished":
        log.info("final weights%s", _dice(event, "final"), extra={"round": number})


def _dice(event: Event, which: str) -> str:
    """Mean over sites and structures, for the log."""
    values = [
        value for scores in (event.scores or {}).values() for name, value in scores.items() if name.startswith("dice/")
    ]
    return f", mean Dice of the {which} weights {sum(values) / len(values):.3f}" if values else ""
