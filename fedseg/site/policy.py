"""What a hospital allows, whatever a study asks: the `[policy]` table of the site file, and how it is enforced.

A request is checked before anything is computed (`check_request`, `check_cases`), an update before it leaves
(`only_allowed`). What may leave is an allow-list: a metric or figure that no rule knows stays at home. The rule that refused
may leave the hospital; the sentence that explains it may not.
"""

import difflib
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import Field, field_validator

from fedseg.config import Experiment
from fedseg.errors import PolicyRefused
from fedseg.federated.fingerprint import UNKNOWN
from fedseg.federated.messages import SiteUpdate
from fedseg.models.registry import ARCHITECTURES
from fedseg.sections import NonNegativeFloat, PositiveFloat, PositiveInt, Section
from fedseg.site.hours import Span, within

SCORES = ("dice", "hd95", "surface_dice")
"""Metrics of which sums and counts by structure may leave."""
FIGURES = ("loss", "steps", "seconds", "data_seconds")
"""Figures of the training that may leave."""
KINDS = (*SCORES, "failures", *FIGURES, "quarantined", "fingerprint")
"""Everything beside tensors and the number of training cases that may leave; `quarantined` counts unusable cases,
`fingerprint` is sums of label-free statistics over the training images."""
MEGABYTE = 1_000_000


class Policy(Section):
    """A hospital's limits; the defaults are for a hospital that knows the study but has not thought about every detail."""

    models: tuple[str, ...] | None = None
    """Names of networks that may be trained; absent: all that `fedseg models` lists."""
    max_local_epochs: PositiveInt = 10
    """Most passes over the training cases in one round. How long a pass is, the study says: see `max_minutes`."""
    max_minutes: PositiveFloat | None = 240.0
    """Longest time that one request may take, on the clock; then it is cancelled. Absent: no limit."""
    labels: tuple[str, ...] | None = None
    """Structures whose metrics may leave; absent: all of the study. Failures are counted over all structures, so their number
    leaves only if all of them may."""
    metrics: tuple[str, ...] | None = None
    """What may leave beside tensors: of `dice`, `hd95`, `surface_dice`, `failures`, `loss`, `steps`, `seconds`, `data_seconds`,
    `quarantined`, `fingerprint`; absent: all of these."""
    min_cases: PositiveInt = 5
    """With fewer usable training cases nothing is trained: the fewer, the more an update says about each."""
    min_validation_cases: PositiveInt = 3
    """With fewer validation cases no sum of metrics leaves. A sum over one case is that case's value, and of two cases, who
    knows one knows the other. Sums over changing sets of cases can still be subtracted from each other."""
    max_clip_norm: PositiveFloat | None = None
    """The study must clip updates, to at most this norm (`privacy.clip_norm`); absent: it need not."""
    min_noise_multiplier: NonNegativeFloat | None = None
    """The study must add at least this much noise (`privacy.noise_multiplier`); absent: it need not."""
    tensors: tuple[str, ...] = ("*",)
    """Patterns for the names of tensors that may leave: `*` is any text, `?` any character. An update with another one is
    refused as a whole."""
    max_megabytes: PositiveFloat = 200.0
    """Largest update, in millions of bytes as they are sent."""
    max_rounds: PositiveInt | None = None
    """Most requests of one study that are answered, repeated rounds and the scoring at the end included; absent: no limit.
    A study that is changed in any way is another one."""
    hours: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """When a request may begin, local time: `["Mo-Fr 18:00-06:00", "Sa-Su 00:00-24:00"]`; absent: always."""

    @field_validator("models")
    @classmethod
    def _networks_are_known(cls, models: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return _known("network", models, ARCHITECTURES)

    @field_validator("metrics")
    @classmethod
    def _metrics_are_known(cls, metrics: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return _known("metric", metrics, KINDS)

    @field_validator("hours")
    @classmethod
    def _hours_can_be_read(cls, hours: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for text in hours or ():
            Span.parse(text)
        return hours

    @property
    def seconds(self) -> float | None:
        """Longest time of one request."""
        return None if self.max_minutes is None else 60 * self.max_minutes

    def describe(self) -> list[tuple[str, str]]:
        """Every rule and what it means, for a table."""
        return [(name, _WORDS[name](getattr(self, name))) for name in Policy.model_fields]


def check_request(policy: Policy, experiment: Experiment, *, train: bool, now: datetime, rounds_done: int) -> None:
    """Refuse a request that the policy does not allow, before anything is computed.

    Args:
        policy: the hospital's.
        experiment: what the study asks.
        train: whether the site is to train, or only to score what it received.
        now: by the clock on the hospital's wall.
        rounds_done: requests of this very experiment that were answered.

    Raises:
        PolicyRefused: the first rule that is broken.
    """
    if policy.models is not None and experiment.model.name not in policy.models:
        _refuse("models", f"network {experiment.model.name!r}; allowed are {_list(policy.models)}")
    if policy.hours is not None and not within(policy.hours, now):
        _refuse("hours", f"a request at {now:%a %H:%M}; allowed are {_list(policy.hours)}")
    if policy.max_rounds is not None and rounds_done >= policy.max_rounds:
        _refuse(
            "max_rounds", f"{rounds_done} requests of this experiment were answered; allowed are {policy.max_rounds}"
        )
    if not train:
        return
    epochs, privacy = experiment.federation.local_epochs, experiment.privacy
    if epochs > policy.max_local_epochs:
        _refuse("max_local_epochs", f"federation.local_epochs is {epochs}; allowed are {policy.max_local_epochs}")
    if policy.max_clip_norm is not None and not (privacy.clip_norm and privacy.clip_norm <= policy.max_clip_norm):
        _refuse("max_clip_norm", f"privacy.clip_norm is {privacy.clip_norm}; it must be {policy.max_clip_norm} at most")
    if policy.min_noise_multiplier is not None and not privacy.noise_multiplier >= policy.min_noise_multiplier:
        asked, least = privacy.noise_multiplier, policy.min_noise_multiplier
        _refuse("min_noise_multiplier", f"privacy.noise_multiplier is {asked}; it must be {least} at least")


def check_cases(policy: Policy, training: int) -> None:
    """Refuse to train on too few cases.

    Raises:
        PolicyRefused: by `min_cases`.
    """
    if training < policy.min_cases:
        _refuse("min_cases", f"{training} usable training cases; it takes {policy.min_cases} at least")


def only_allowed(
    policy: Policy, update: SiteUpdate, structures: Collection[str], *, validation_cases: int
) -> SiteUpdate:
    """What may leave of an update; sums and figures that may not are left out.

    Args:
        policy: the hospital's.
        update: what the site has computed.
        structures: of the study, without background.
        validation_cases: over which the sums were taken.

    Raises:
        PolicyRefused: a tensor may not leave, the update is too large, or it was trained on too few cases.
    """
    if update.delta or update.fingerprint:
        check_cases(policy, update.num_cases)
    for name in update.delta:
        if not any(fnmatchcase(name, pattern) for pattern in policy.tensors):
            _refuse("tensors", f"tensor {name!r}; allowed are {_list(policy.tensors)}")
    kinds = allowed_kinds(policy)
    allowed = replace(
        update,
        sums=_allowed_sums(policy, update.sums, structures, kinds, validation_cases),
        training={name: value for name, value in update.training.items() if name in FIGURES and name in kinds},
        quarantined=dict(update.quarantined) if "quarantined" in kinds else {},
        fingerprint=update.fingerprint if "fingerprint" in kinds else UNKNOWN,
    )
    size = sum(memoryview(buffer).nbytes for buffer in allowed.buffers())
    if size > policy.max_megabytes * MEGABYTE:
        _refuse("max_megabytes", f"an update of {size / MEGABYTE:.3f} MB; allowed are {policy.max_megabytes:g}")
    return allowed


def allowed_kinds(policy: Policy) -> tuple[str, ...]:
    """What may leave beside tensors and the number of training cases."""
    return KINDS if policy.metrics is None else policy.metrics


def _allowed_sums(
    policy: Policy, sums: dict[str, float], structures: Collection[str], kinds: Collection[str], validation_cases: int
) -> dict[str, float]:
    if not all(number >= policy.min_validation_cases for number in (validation_cases, sums.get("cases", 0.0))):
        return {}
    labels = set(structures) if policy.labels is None else set(structures) & set(policy.labels)
    leaving: dict[str, float] = {}
    for score in SCORES:
        for label in labels if score in kinds else ():
            total, count = f"{score}/{label}/sum", f"{score}/{label}/count"
            if total in sums and sums.get(count, 0.0) >= policy.min_validation_cases:
                leaving |= {total: sums[total], count: sums[count]}
    if "failures" in kinds and "failures" in sums and labels == set(structures):
        leaving["failures"] = sums["failures"]
    if leaving:
        leaving["cases"] = sums["cases"]
    return {name: value for name, value in sums.items() if name in leaving}


def _known(what: str, names: tuple[str, ...] | None, known: Collection[str]) -> tuple[str, ...] | None:
    for name in names or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}" if near else f"known are {_list(known)}"
            raise ValueError(f"no {what} is called {name!r}; {hint}")
    return names


def _refuse(rule: str, message: str) -> None:
    raise PolicyRefused(rule, f"policy.{rule}: {message}")


def _list(names: Collection[str]) -> str:
    return ", ".join(names) or "none"


def _any_or(names: Collection[str] | None, unlimited: str) -> str:
    return unlimited if names is None else "only " + ", ".join(names) if names else "none"


_WORDS: dict[str, Callable[[Any], str]] = {
    "models": lambda names: f"networks: {_any_or(names, 'all')}",
    "max_local_epochs": lambda number: f"at most {number} local epochs",
    "max_minutes": lambda number: (
        "any time per request" if number is None else f"at most {number:g} minutes per request"
    ),
    "labels": lambda names: f"structures whose metrics leave: {_any_or(names, 'all of the study')}",
    "metrics": lambda names: f"metrics and figures that leave: {_any_or(names, 'all')}",
    "min_cases": lambda number: f"trains with {number} cases or more",
    "min_validation_cases": lambda number: f"sums of metrics leave with {number} validation cases or more",
    "max_clip_norm": lambda number: (
        "updates need not be clipped" if number is None else f"updates are clipped to {number:g} or less"
    ),
    "min_noise_multiplier": lambda number: (
        "updates need no noise" if number is None else f"noise multiplier of {number:g} or more"
    ),
    "tensors": lambda patterns: f"tensors that leave: {', '.join(patterns) or 'none'}",
    "max_megabytes": lambda number: f"at most {number:g} MB per update",
    "max_rounds": lambda number: "any number of requests" if number is None else f"at most {number} requests per study",
    "hours": lambda spans: "at any time" if spans is None else "begins " + ", ".join(spans),
}
