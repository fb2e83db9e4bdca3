"""Run a federation round by round, over whatever carries the messages.

A round ends with the updates that came in before its deadline and passed screening, if they reach the quorum; otherwise it
is repeated. What a site reports about its own failure, a refused update, a late answer: all of it is kept in the store,
none of it touches the weights.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from fedseg.config import Experiment
from fedseg.errors import QuorumError, UpdateRefused
from fedseg.federated.aggregation import Aggregator, make_aggregator
from fedseg.federated.faults import reach
from fedseg.federated.fingerprint import Fingerprint, joined, vote
from fedseg.federated.messages import Answer, RoundInstructions, SiteFailure, SiteUpdate
from fedseg.federated.phases import PhaseClock
from fedseg.federated.rounds import (
    CONTROL,
    AcceptedUpdate,
    RoundReport,
    ServerState,
    apply_round,
    choose_sites,
    final_instructions,
    fingerprint_instructions,
    instructions_for,
    site_weight,
)
from fedseg.federated.screening import screen, screen_fingerprint, screen_scores
from fedseg.federated.sketch import Sketch, cosine, sketch
from fedseg.federated.steps import Controls, NormalisedMean, reported_steps
from fedseg.federated.store import RunStore
from fedseg.federated.weights import Weights, num_bytes
from fedseg.metrics import means_from_sums


class Fleet(Protocol):
    """The sites of a federation and a way to reach them: in this process, in workers, or over Flower."""

    def sites(self) -> Sequence[str]:
        """Names of the sites that can be asked now."""

    def exchange(
        self, instructions: RoundInstructions, sites: Sequence[str], deadline: float | None
    ) -> Iterator[Answer]:
        """Hand over the requests, as far as that can be told from waiting, and return the answers as they arrive.

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
    observe: Observer | None = None,
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
    run = _Run(experiment, document, fleet, store, observe or (lambda _: None))
    state = store.resume(experiment) if resume else None
    if state is None:
        state = start()
        store.begin(experiment, state)
    if experiment.data.fingerprint and not state.server_round:
        state = replace(state, fingerprint=run.look())
    while state.server_round < experiment.federation.rounds:
        state = run.round_after(state)
    if not store.is_finished():
        run.close(state)
    return state


@dataclass
class _Attempt:
    """What came in during one try at a round."""

    number: int
    asked: tuple[str, ...]
    aggregator: Aggregator
    clock: PhaseClock
    controls: Controls | None = None
    accepted: dict[str, AcceptedUpdate] = field(default_factory=dict)
    sketches: dict[str, Sketch] = field(default_factory=dict)
    """Of the accepted updates' parameters; the updates themselves are not kept."""


@dataclass(frozen=True)
class _Run:
    """What stays the same from round to round."""

    experiment: Experiment
    document: str
    """The experiment as JSON, made once."""
    fleet: Fleet
    store: RunStore
    observe: Observer

    def round_after(self, state: ServerState) -> ServerState:
        """Run one round and commit it."""
        attempt, failures = self._until_quorum(state)
        attempt.clock.enter("aggregate")
        joined = attempt.aggregator.result()
        accepted = _with_cosines(attempt, joined, state)
        norms = [update.norm for update in accepted]
        control = None
        if attempt.controls is not None:
            control = attempt.controls.after(state.moments.get(CONTROL), len(self.fleet.sites()))
        after = apply_round(state, joined, norms, self.experiment.federation, control)
        phases = attempt.clock.seconds()
        seconds = sum(phases.values())
        report = RoundReport(after.server_round, attempt.number, attempt.asked, accepted, failures, seconds, phases)
        scores = {update.site: means_from_sums(update.sums) for update in report.accepted if update.sums}
        self.store.waiting.enter("checkpoint")
        self.store.commit_round(after, report, {state.server_round: scores} if scores else None)
        self.store.waiting.end()
        self.observe(Event("finished-round", after.server_round, report=report, scores=scores))
        return after

    def look(self) -> Fingerprint:
        """Ask all sites for their fingerprints, and join them; whoever fails or keeps its own is left out."""
        instructions = fingerprint_instructions(self.document)
        asked = tuple(sorted(self.fleet.sites()))
        found: dict[str, Fingerprint] = {}
        self.store.waiting.begin(instructions.server_round, asked)
        for answer in self._exchange(instructions, asked):
            self.store.waiting.answered(answer.site)
            try:
                if isinstance(answer, SiteFailure):
                    self._note(answer)
                    continue
                _check_asked(answer, asked, found)
                screen_fingerprint(answer, instructions.server_round, len(self.experiment.task.channels))
                found[answer.site] = answer.fingerprint
            except UpdateRefused as refusal:
                self._note(SiteFailure(answer.site, instructions.server_round, "refused", refusal.reason))
        self.store.waiting.end()
        for site, signs in vote({name: print_ for name, print_ in found.items() if print_}).items():
            reversed_channels = ", ".join(str(number) for number, sign in enumerate(signs) if sign < 0)
            told = f"{found[site].cases} cases" + (
                f", reversed in channel {reversed_channels}" if reversed_channels else ""
            )
            self.store.event("fingerprint", 0, site, told)
        return joined(found, aligned=self.experiment.data.polarity == "aligned")

    def close(self, state: ServerState) -> None:
        """Have the final weights scored by every site that can; whoever fails is left out of the scores."""
        instructions = final_instructions(state, self.document)
        asked = tuple(sorted(self.fleet.sites()))
        scores: dict[str, dict[str, float]] = {}
        self.store.waiting.begin(state.server_round, asked, closing=True)
        clock = PhaseClock("evaluate")
        for answer in self._exchange(instructions, asked):
            self.store.waiting.answered(answer.site)
            try:
                if isinstance(answer, SiteUpdate):
                    _check_asked(answer, asked, scores)
                    screen_scores(answer, instructions.server_round)
                    scores[answer.site] = means_from_sums(answer.sums) if answer.sums else {}
                    continue
                failure = answer
            except UpdateRefused as refusal:
                failure = SiteFailure(answer.site, instructions.server_round, "refused", refusal.reason)
            self._note(failure)
        scores = {site: scores[site] for site in sorted(scores) if scores[site]}
        self.store.finish(state.server_round, scores, clock.seconds())
        self.store.waiting.end()
        self.observe(Event("finished", state.server_round, scores=scores))

    def _exchange(self, instructions: RoundInstructions, asked: tuple[str, ...]) -> Iterator[Answer]:
        answers = self.fleet.exchange(instructions, asked, self.experiment.federation.deadline)
        size = num_bytes(instructions.weights) + num_bytes(instructions.control)
        self.store.sent(instructions.server_round, asked, size)
        return answers

    def _until_quorum(self, state: ServerState) -> tuple[_Attempt, tuple[SiteFailure, ...]]:
        config = self.experiment.federation
        instructions = instructions_for(state, self.experiment, self.document)
        server_round, failures = instructions.server_round, list[SiteFailure]()
        for number in range(1, config.max_attempts + 1):
            asked = choose_sites(self.fleet.sites(), self.experiment, server_round, number)
            self.observe(Event("round", server_round, asked=asked))
            self.store.waiting.begin(server_round, asked, number)
            reach("round-begun")
            clock = PhaseClock("broadcast", self.store.waiting.enter)
            attempt = _Attempt(number, asked, self._aggregator(state), clock, self._controls(state))
            answers = self._exchange(instructions, asked)
            clock.enter("wait")
            for answer in answers:
                self.store.waiting.answered(answer.site)
                clock.enter("aggregate")
                outcome = self._take(answer, attempt, state)
                if isinstance(outcome, SiteFailure):
                    failures.append(outcome)
                    self._note(outcome)
                self.observe(Event("answer", server_round, answer=outcome))
                clock.enter("wait")
            if len(attempt.accepted) >= config.min_sites:
                return attempt, tuple(sorted(failures, key=lambda failure: failure.site))
            shortfall = f"{len(attempt.accepted)} of {config.min_sites} sites needed"
            self.store.event("repeated", server_round, detail=shortfall)
            self.observe(Event("repeat", server_round))
        reasons = "; ".join(sorted({f"{failure.site}: {failure.kind} ({failure.reason})" for failure in failures}))
        raise QuorumError(
            f"round {server_round}: fewer than {config.min_sites} sites gave an update in {config.max_attempts} attempts."
            f" {reasons or 'No site failed: too few are connected'}"
        )

    def _aggregator(self, state: ServerState) -> Aggregator:
        config = self.experiment.federation
        if config.normalise_steps:
            return NormalisedMean(self.experiment.training, state.buffers)
        return make_aggregator(config.aggregate, config.trim)

    def _controls(self, state: ServerState) -> Controls | None:
        config = self.experiment.federation
        if not config.control_variates:
            return None
        return Controls(self.experiment.training, state.server_round / config.rounds, state.buffers)

    def _take(self, answer: Answer, attempt: _Attempt, state: ServerState) -> AcceptedUpdate | SiteFailure:
        if isinstance(answer, SiteFailure):
            return answer
        server_round, federation = state.server_round + 1, self.experiment.federation
        try:
            _check_asked(answer, attempt.asked, attempt.accepted)
            size = screen(answer, server_round, state.exchanged, state.norms, federation.screening, state.buffers)
            controls = attempt.controls
            steps = reported_steps(answer.site, answer.training) if controls or federation.normalise_steps else 1
            gradient = None if controls is None else controls.gradient(answer.site, answer.delta, steps)
            attempt.aggregator.fold(answer.site, answer.delta, site_weight(answer.num_cases, federation), steps)
            if controls is not None and gradient is not None:
                controls.fold(answer.site, gradient)
            attempt.sketches[answer.site] = sketch(answer.delta, state.buffers)
        except UpdateRefused as refusal:
            return SiteFailure(answer.site, server_round, "refused", refusal.reason)
        accepted = AcceptedUpdate(
            site=answer.site,
            num_cases=answer.num_cases,
            norm=size,
            num_bytes=num_bytes(answer.delta),
            seconds=attempt.clock.elapsed(),
            sums=answer.sums,
            training=answer.training,
            quarantined=answer.quarantined,
            manifest=answer.manifest,
        )
        attempt.accepted[answer.site] = accepted
        reach("update-folded")
        return accepted

    def _note(self, failure: SiteFailure) -> None:
        self.store.event(failure.kind, failure.server_round, failure.site, failure.reason)


def _with_cosines(attempt: _Attempt, joined: Weights, state: ServerState) -> tuple[AcceptedUpdate, ...]:
    """The accepted updates in the order of their sites' names, each with its angle to the joint one."""
    together = sketch(joined, state.buffers)
    return tuple(
        replace(attempt.accepted[site], cosine=cosine(attempt.sketches[site], together))
        for site in sorted(attempt.accepted)
    )


def _check_asked(answer: SiteUpdate, asked: Collection[str], answered: Collection[str]) -> None:
    if answer.site not in asked or answer.site in answered:
        raise UpdateRefused("unasked", f"{answer.site} was not asked, or has answered before")
