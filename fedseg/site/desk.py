"""What a site does with a request: check it against the hospital's policy, have it trained, write down what leaves.

One desk serves for weeks: the network stays on the device, the preprocessed volumes stay open. Nothing leaves before the audit
log has it on disk; a site that cannot write its log gives no update.
"""

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fedseg import logs
from fedseg.config import Experiment, parse_experiment
from fedseg.data.cache import lookups
from fedseg.errors import AuditError, PolicyRefused, RoundCancelled, SiteAbstained
from fedseg.federated.document import Buffer
from fedseg.federated.fingerprint import Fingerprint
from fedseg.federated.messages import Answer, RoundInstructions, SiteFailure, SiteUpdate
from fedseg.federated.site import Site, Watch
from fedseg.site.audit import AuditLog, rounds_done, what_left
from fedseg.site.config import SiteConfig
from fedseg.site.manifest import DataManifest, changes, load, make_manifest, save, sign
from fedseg.site.policy import Policy, allowed_kinds, check_cases, check_request, only_allowed
from fedseg.site.tally import STRUCTURES_SHOWN, Tally

log = logging.getLogger(__name__)


@dataclass
class _Request:
    """One request and what is known about it, for the audit log."""

    train: bool
    watch: Watch
    begun: float = field(default_factory=time.monotonic)
    asked: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    server_round: int = 0
    decided: str = "failed"
    rule: str | None = None
    report: dict[str, Any] = field(default_factory=dict)
    limit: float | None = None
    """Minutes that the policy gives it."""

    def watched(self, phase: str, done: int, total: int) -> None:
        """Pass progress on, and end what takes longer than the policy allows."""
        if self.limit is not None and time.monotonic() - self.begun > 60 * self.limit:
            raise PolicyRefused("max_minutes", f"the request has taken longer than {self.limit:g} minutes")
        self.watch(phase, done, total)


class Desk:
    """Answers requests for one site, one at a time.

    Args:
        config: the hospital's own decisions.
    """

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        config.state_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._log = AuditLog(config.audit_log)
        self.tally = Tally(config.audit_log)
        self._site = Site(config)
        self._warned = ""
        self._manifest = load(config.manifest) if config.manifest.exists() else None

    @logs.about()
    def answer(self, document: Buffer, *, train: bool, watch: Watch) -> list[Buffer] | SiteFailure:
        """The document that may leave, or a code that says why there is none.

        Args:
            document: instructions as bytes.
            train: what the caller came for; other instructions are refused.
            watch: told about progress; may raise `RoundCancelled`.

        Raises:
            AuditError: the audit log cannot be written; then nothing may leave.
        """
        request = _Request(train, watch)
        request.asked = {"kind": "train" if train else "evaluate", "bytes": len(document), "sha256": _sha256(document)}
        self._site.watch, before = request.watched, lookups.copy()
        answer = self._answer(document, request)
        buffers: list[Buffer] = []
        left: dict[str, Any] = {"reason": answer.reason} if isinstance(answer, SiteFailure) else {}
        if isinstance(answer, SiteUpdate):
            buffers = answer.buffers()
            left = what_left(answer, _sha256(*buffers), sum(len(memoryview(buffer).cast("B")) for buffer in buffers))
        if looked := lookups - before:
            request.report["cache"] = dict(looked)
        seconds = round(time.monotonic() - request.begun, 3)
        self._write(
            {"event": "request", "asked": request.asked, "decided": request.decided, "rule": request.rule,
             "seconds": seconds, **request.report, "left": left}
        )  # fmt: skip
        return answer if isinstance(answer, SiteFailure) else buffers

    def note(self, event: str, **details: Any) -> None:
        """Write something else into the audit log."""
        self._write({"event": event, **details})

    def _write(self, entry: dict[str, Any]) -> None:
        try:
            written = self._log.append(entry)
        except AuditError:
            self.tally.unwritten()
            raise
        self.tally.take(written)

    def _answer(self, document: Buffer, request: _Request) -> Answer:
        """Like `answer_safely`: an error leaves as its class, a decision as its code."""
        name = self.config.name
        try:
            instructions = RoundInstructions.decode(document)
            request.server_round = instructions.server_round
            logs.now_about(round=request.server_round)
            update = self._update(instructions, request)
        except PolicyRefused as refusal:
            log.warning("round %d refused: %s", request.server_round, refusal)
            request.decided, request.rule = "refused", refusal.rule
            return SiteFailure(name, request.server_round, "abstained", f"policy.{refusal.rule}")
        except SiteAbstained as abstention:
            log.warning("abstains from round %d: %s", request.server_round, abstention)
            request.decided, request.rule = "abstained", abstention.reason
            return SiteFailure(name, request.server_round, "abstained", abstention.reason)
        except RoundCancelled:
            log.warning("round %d was cancelled", request.server_round)
            request.decided = "cancelled"
            return SiteFailure(name, request.server_round, "failed", "RoundCancelled")
        except Exception as error:
            log.exception("round %d failed", request.server_round)
            return SiteFailure(name, request.server_round, "failed", type(error).__name__)
        request.decided = "allowed"
        log.info("round %d is answered after %.1f s", request.server_round, time.monotonic() - request.begun)
        return update

    def _update(self, instructions: RoundInstructions, request: _Request) -> SiteUpdate:
        config, policy = self.config, self.config.policy
        experiment = parse_experiment(instructions.experiment)
        request.digest = experiment.digest()
        request.asked |= _asked(instructions, experiment, request.digest)
        request.limit = policy.max_minutes
        if instructions.train != request.train:
            raise PolicyRefused("kind", "the instructions are of another kind than the call that brought them")
        done = rounds_done(config.audit_log, request.digest) if policy.max_rounds is not None else 0
        check_request(policy, experiment, train=request.train, now=datetime.now().astimezone(), rounds_done=done)
        manifest = self._current_manifest(request)
        data = self._site.prepare(experiment, instructions.fingerprint)
        check_cases(policy, len(data.training.cases))
        update = self._site(instructions)
        request.report = {"cases": update.num_cases, "training": dict(update.training), "manifest": manifest}
        if request.train and self._site.last_training is not None:
            request.report["patches"] = self._site.last_training.cases
        update = replace(update, manifest=manifest)
        update = only_allowed(policy, update, experiment.task.structures, validation_cases=len(data.validation.cases))
        request.report |= _told(update, policy)
        if instructions.fingerprint:
            request.report["drift"] = self._drift(experiment, instructions.fingerprint)
        return update

    def _drift(self, experiment: Experiment, fingerprint: Fingerprint) -> dict[str, Any]:
        """What the hospital should know of its images; nobody else is told."""
        try:
            drift = self._site.drift(experiment, fingerprint)
        except ValueError as error:
            return {"unknown": str(error)}
        if drift.alarm and str(drift) != self._warned:
            log.warning("the images are unlike those of the others: %s", drift)
        self._warned = str(drift)
        return {
            "alarm": drift.alarm,
            "cases": drift.cases,
            "unusual": drift.unusual,
            "expected": drift.expected,
            "words": list(drift.words),
            "may_leave": "fingerprint" in allowed_kinds(self.config.policy),
        }

    def _current_manifest(self, request: _Request) -> str:
        """Digest of what is in the data folder now; if that has changed, volumes are read anew."""
        cohort = self._site.cohort()
        manifest = make_manifest(
            cohort,
            self.config.name,
            self.config.state_folder,
            on_case=lambda done: request.watched("checking", done, len(cohort.cases)),
        )
        if self._manifest is None or manifest.digest() != self._manifest.digest():
            self._accept(manifest)
        return manifest.digest()

    def _accept(self, manifest: DataManifest) -> None:
        if self._manifest is not None:
            told = changes(self._manifest, manifest)
            log.warning("the data have changed: %s", "; ".join(told))
            self._site = Site(self.config, watch=self._site.watch)
        key = self.config.key
        signature = sign(manifest, Path(key)) if key is not None else b""
        save(manifest, self.config.manifest, signature)
        before = self._manifest.digest() if self._manifest is not None else None
        self._write({"event": "data", "before": before, "manifest": manifest.digest(), "signed": key is not None})
        self._manifest = manifest


def _asked(instructions: RoundInstructions, experiment: Experiment, digest: str) -> Mapping[str, Any]:
    return {
        "study": experiment.name,
        "experiment": digest,
        "server_round": instructions.server_round,
        "model": experiment.model.name,
        "local_epochs": experiment.federation.local_epochs,
        "surface": instructions.surface,
    }


def _told(update: SiteUpdate, policy: Policy) -> dict[str, Any]:
    """Scores and counts that leave, as the hospital's own series show them."""
    told: dict[str, Any] = {}
    if "cases" in update.sums:
        told["validation_cases"] = int(update.sums["cases"])
    dice = {
        label: update.sums[name] / update.sums[f"dice/{label}/count"]
        for name in update.sums
        if name.startswith("dice/") and name.endswith("/sum")
        for label in [name.removeprefix("dice/").removesuffix("/sum")]
    }
    if dice:
        told["dice"] = dict([*dice.items()][:STRUCTURES_SHOWN])
    if policy.metrics is None or "quarantined" in policy.metrics:
        told["quarantined"] = dict(update.quarantined)
    return told


def _sha256(*buffers: Buffer) -> str:
    state = hashlib.sha256()
    for buffer in buffers:
        state.update(buffer)
    return state.hexdigest()
