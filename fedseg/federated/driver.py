"""Run a federation round by round, over whatever carries the messages."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fedseg.config import Experiment
from fedseg.errors import QuorumError, UpdateRefused
from fedseg.federated.aggregation import make_aggregator
from fedseg.federated.faults import reach
from fedseg.federated.messages import Answer, RoundInstructions, SiteFailure, SiteUpdate
from fedseg.federated.rounds import (
    AcceptedUpdate,
    RoundReport,
    ServerState,
    apply_round,
    choose_sites,
    final_instructions,
    instructions_for,
    site_weight,
)
from fedseg.federated.screening import screen
from fedseg.federated.store import RunStore
from fedseg.federated.sums import means
from fedseg.federated.weights import Weights, num_bytes


class Fleet(Protocol):
    """The sites of a federation and a way to reach them: in this process, in workers, or over Flower."""

    def sites(self) -> Sequence[str]:
        """Names of the sites that can be asked now."""

    def exchange(
        self, instructions: RoundInstructions, sites: Sequence[str], deadline: float | None
    ) -> Iterator[Answer]:
        """Ask sites and yield their answers as they arrive.

        Args:
            instructions: the same for all.
            sites: whom to ask.
            deadline: seconds after which missing answers are given up as `late`.
        """


@dataclass(frozen=True)
class Event:
    """Something that an observer may want to show."""

    kind: Literal["round", "answer", "repeat", "finished-round", "finished"]
    server_round: int
    asked: tuple[str, ...] = ()
    answer: AcceptedUpdate | SiteFailure | None = None
    report: RoundReport | None = None
    scores: dict[str, dict[str, float]] | None = None
    """Metric means by site, for the weights of `server_round`."""


Observer = Callable[[Event], None]


def run_federation(
    experiment: Experiment,
    fleet: Fleet,
    store: RunStore,
    start: Callable[[], ServerState],
    *,
    resume: bool = False,
    observe: Observer = lambda event: None,
) -> ServerState:
    """Run all rounds and the closing evaluation.

    Args:
        experiment: what to run.
        fleet: the sites.
        store: where every finished round is kept.
        start: makes the initial state; called only for a new run.
        resume: go on after the last finished round, if there is one.
        observe: is told what happens.

    Returns:
        The state after the last round.

    Raises:
        QuorumError: a round failed `max_attempts` times. The store holds everything before it.
        StoreError: the store holds another run, or this one and `resume` is False.
    """
    document = experiment.to_json()
    state = store.resume(experiment) if resume else None
    if state is None:
        state = start()
        store.begin(experiment, state)
    while state.server_round < experiment.federation.rounds:
        instructions = instructions_for(state, experiment, document)
        joined, report, answers = _run_round(state, instructions, experiment, fleet, store, observe)
        state = apply_round(state, joined, [update.norm for update in report.accepted], experiment.federation)
        scores = _scores(answers)
        store.commit_round(state, report, {state.server_round - 1: scores} if scores else None)
        observe(Event("finished-round", state.server_round, report=report, scores=scores))
    if not store.is_finished():
        closing = final_instructions(state, document)
        answers = [
            answer for answer in fleet.exchange(closing, sorted(fleet.sites()), None) if isinstance(answer, SiteUpdate)
        ]
        scores = _scores(answers)
        store.finish(state.server_round, scores)
        observe(Event("finished", state.server_round, scores=scores))
    return state


def _run_round(
    state: ServerState,
    instructions: RoundInstructions,
    experiment: Experiment,
    fleet: Fleet,
    store: RunStore,
    observe: Observer,
) -> tuple[Weights, RoundReport, list[SiteUpdate]]:
    config, server_round = experiment.federation, instructions.server_round
    failures: list[SiteFailure] = []
    for attempt in range(1, config.max_attempts + 1):
        begun = time.monotonic()
        asked = choose_sites(fleet.sites(), experiment, server_round, attempt)
        observe(Event("round", server_round, asked=asked))
        reach("round-begun")
        aggregator = make_aggregator(config.aggregate, config.trim)
        accepted: list[AcceptedUpdate] = []
        answers: list[SiteUpdate] = []
        for answer in fleet.exchange(instructions, asked, config.deadline):
            outcome: AcceptedUpdate | SiteFailure
            if isinstance(answer, SiteFailure):
                outcome = answer
            elif answer.site not in asked or any(update.site == answer.site for update in accepted):
                outcome = SiteFailure(answer.site, server_round, "refused", "unasked")
            else:
                outcome = _accept(answer, state, experiment, aggregator.fold, time.monotonic() - begun)
            if isinstance(outcome, SiteFailure):
                failures.append(outcome)
                store.event(outcome.kind, server_round, outcome.site, outcome.reason)
            else:
                accepted.append(outcome)
                answers.append(_without_delta(answer))
                reach("update-folded")
            observe(Event("answer", server_round, answer=outcome))
        if len(accepted) >= config.min_sites:
            accepted.sort(key=lambda update: update.site)
            failures.sort(key=lambda failure: failure.site)
            seconds = time.monotonic() - begun
            report = RoundReport(server_round, attempt, asked, tuple(accepted), tuple(failures), seconds)
            return aggregator.result(), report, answers
        store.event("repeated", server_round, detail=f"{len(accepted)} of {config.min_sites} sites needed")
        observe(Event("repeat", server_round))
    reasons = "; ".join(sorted({f"{failure.site}: {failure.kind} ({failure.reason})" for failure in failures}))
    raise QuorumError(
        f"round {server_round}: fewer than {config.min_sites} sites gave an update in {config.max_attempts} attempts. {reasons}"
    )


def _accept(
    answer: SiteUpdate,
    state: ServerState,
    experiment: Experiment,
    fold: Callable[[str, Weights, int], None],
    seconds: float,
) -> AcceptedUpdate | SiteFailure:
    try:
        size = screen(answer, state.server_round + 1, state.weights, state.norms, experiment.federation.screening)
        fold(answer.site, answer.delta, site_weight(answer.num_cases, experiment.federation))
    except UpdateRefused as refusal:
        return SiteFailure(answer.site, state.server_round + 1, "refused", refusal.reason)
    return AcceptedUpdate(
        answer.site,
        answer.num_cases,
        size,
        num_bytes(answer.delta),
        seconds,
        answer.sums,
        answer.training,
        answer.quarantined,
    )


def _without_delta(answer: Answer) -> SiteUpdate:
    assert isinstance(answer, SiteUpdate)
    return SiteUpdate(
        answer.site, answer.server_round, {}, answer.num_cases, answer.sums, answer.training, answer.quarantined
    )


def _scores(answers: Sequence[SiteUpdate]) -> dict[str, dict[str, float]]:
    return {
        answer.site: means(answer.sums) for answer in sorted(answers, key=lambda answer: answer.site) if answer.sums
    }
