"""Our messages as Flower's records, and Flower's nodes as a fleet: the only library module that speaks Flower.

A message crosses Flower as one array of bytes, in the format of `fedseg.federated.messages`. One array, not one per tensor:
Flower hashes, stores, pushes and pulls every array as an object of its own, each with HTTP requests of its own (for 300
tensors an exchange takes more than five times as long: benchmarks/flower_wire).

What a node sends is not trusted: an answer counts for the site that was asked, whatever name stands in it, and a reply that
cannot be read is a failure of that site.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when flwr is imported

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedseg import __version__
from fedseg.errors import MessageError, QuorumError
from fedseg.federated.messages import Answer, RoundInstructions, SiteFailure, SiteUpdate
from fedseg.members import Member
from fedseg.puller import Puller
from fedseg.site.connect import Refusal

log = logging.getLogger(__name__)

POLL = (0.05, 1.0)
"""Shortest and longest pause in seconds between two looks for answers; it doubles while there is none."""
SECONDS_PER_LOOK = 0.05
"""Pause for each site that is looked for, if that is longer than the longest: many sites must not keep the SuperLink busy."""
HELLO_SECONDS = 30.0
"""How long a node may take to say its name before the others go on without it."""
ASK_AGAIN_SECONDS = 60.0
"""After which a node that did not say its name is asked again."""
TTL = 7 * 24 * 3600.0
"""Seconds after which Flower drops a message of a round without a deadline."""
CLOCK_SLACK = 3600.0
"""How far the clocks of server and sites may differ before Flower drops messages of a round with a deadline."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ERRORS = {
    code: name.title().replace("_", "") for name, code in vars(ErrorCode).items() if name.isupper()
}  # CLIENT_APP_CRASHED -> ClientAppCrashed


# ------------------------------------------------------------------------------------------------ records
def pack_instructions(instructions: RoundInstructions) -> RecordDict:
    """Instructions as a record; the same one serves all sites."""
    return RecordDict({"instructions": _pack(instructions.encode())})


def read_instructions(content: RecordDict) -> RoundInstructions:
    """Read the record of `pack_instructions`.

    Raises:
        MessageError: it is something else.
    """
    return RoundInstructions.decode(_unpack(content, "instructions"))


def pack_answer(answer: Answer) -> RecordDict:
    """A site's answer as a record."""
    if isinstance(answer, SiteUpdate):
        return RecordDict({"update": _pack(answer.encode())})
    return _failure(answer.kind, answer.reason)


def read_answer(message: Message, site: str, server_round: int) -> Answer:
    """Read a node's reply.

    Args:
        message: the reply.
        site: who was asked.
        server_round: for which round.

    Returns:
        The update, or the failure if the reply is one, is Flower's own error, cannot be read or carries another name.
    """
    if message.has_error():
        return SiteFailure(site, server_round, "failed", _ERRORS.get(message.error.code, "FlowerError"))
    try:
        failure = message.content.get("failure")
        if isinstance(failure, ConfigRecord):
            said, reason = failure.get("kind"), _code(failure.get("reason"))
            if said == "late":  # a simulated machine, in an engine that has a clock of its own
                return SiteFailure(site, server_round, "late", reason)
            return SiteFailure(site, server_round, "abstained" if said == "abstained" else "failed", reason)
        update = SiteUpdate.decode(_unpack(message.content, "update"))
    except MessageError:
        return SiteFailure(site, server_round, "failed", "MessageError")
    if update.site != site:
        return SiteFailure(site, server_round, "failed", "WrongName")
    return update


class Described(Protocol):
    """A site that tells its name."""

    @property
    def site(self) -> str:
        """Its name in the federation."""

    @property
    def version(self) -> str:
        """Its release of fedseg."""


class Gate(Protocol):
    """What stands between Flower and a site; it relays documents and reads none."""

    def describe(self) -> Described:
        """Who the site is."""

    def ask(self, instructions: bytes, *, train: bool) -> bytes | Refusal:
        """The document that answers a document."""


def reply_to(message: Message, connect: Callable[[], AbstractContextManager[Gate]]) -> Message:
    """What a site's ClientApp answers to any message.

    This is the gate's broad `except`: an error that left it would carry its text, a patient's file name say, into the
    server's log.

    Args:
        message: `query` asks for the name, `train` and `evaluate` carry instructions.
        connect: reaches the site.
    """
    try:
        with connect() as gate:
            content = _asked(gate, message)
    except Exception as error:
        log.exception("no answer to a %s message", message.metadata.message_type)
        content = _failure("failed", type(error).__name__)
    return Message(content, reply_to=message)


def _asked(gate: Gate, message: Message) -> RecordDict:
    kind = message.metadata.message_type
    if kind == "query":
        site = gate.describe()
        return RecordDict({"site": ConfigRecord({"name": site.site, "version": site.version})})
    answer = gate.ask(_unpack(message.content, "instructions"), train=kind == "train")
    if isinstance(answer, Refusal):
        return _failure(answer.kind, answer.reason)
    return RecordDict({"update": _pack(answer)})


def _failure(kind: str, reason: str) -> RecordDict:
    return RecordDict({"failure": ConfigRecord({"kind": kind, "reason": reason})})


def _pack(data: bytes) -> ArrayRecord:
    return ArrayRecord({"message": Array(dtype="uint8", shape=(len(data),), stype="fedseg", data=data)})


def _unpack(content: RecordDict, key: str) -> bytes:
    record = content.get(key)
    if not isinstance(record, ArrayRecord) or set(record) != {"message"}:
        raise MessageError(f"the reply holds no {key}")
    return record["message"].data


def _code(reason: object) -> str:
    """A reason that came from outside: a plain word or nothing, for it ends up in logs and reports."""
    return reason if isinstance(reason, str) and _NAME.fullmatch(reason) else "Unreadable"


# ------------------------------------------------------------------------------------------------ fleet
class FlowerFleet:
    """The sites behind a Flower grid. Nodes may come and go.

    With a list of who is who, a site's name is that of its registered key. Without one (a trial, a simulation) every new node is
    asked once for its site's name; of two nodes with one name, only the one that came first is asked.

    Args:
        grid: what Flower gives a ServerApp.
        who: sites by number of the node, read anew again and again; nodes that are not in it are left alone, and one that was
            started anew after it was asked is asked once more, for Flower does not notice that its answer is lost.
        min_sites: `sites` waits until so many are connected.
        patience: seconds that it waits.
        check: called while waiting; may raise, if what carries the messages has died.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        who: Callable[[], Mapping[int, Member]] | None = None,
        min_sites: int = 1,
        patience: float = 600.0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._grid, self._who, self._min_sites, self._patience, self._check = grid, who, min_sites, patience, check
        self._names: dict[int, str] = {}
        self._asked: dict[int, float] = {}
        self._queries: dict[str, int] = {}
        self._nodes: dict[str, int] = {}
        self._told: set[str] = set()

    def sites(self) -> Sequence[str]:
        """Names of the connected sites.

        Raises:
            QuorumError: fewer than `min_sites` were connected for `patience` seconds.
        """
        return self.wait_for(self._min_sites)

    def wait_for(self, count: int) -> Sequence[str]:
        """Wait until `count` sites are connected.

        Raises:
            QuorumError: they were not within `patience` seconds.
        """
        begun, pauses = time.monotonic(), _pauses()
        while not (self._everyone_was_heard() and len(self._nodes) >= count):
            self._check()
            connected = ", ".join(sorted(self._nodes)) or "none"
            if time.monotonic() - begun > self._patience:
                if len(self._nodes) >= count:
                    break
                raise QuorumError(
                    f"{len(self._nodes)} of {count} sites were connected after {self._patience:.0f} s ({connected}); "
                    "start the SuperNodes of the others (their logs say whether they reach this server), or ask for fewer"
                )
            self._tell(f"waiting for sites: {len(self._nodes)} of {count} connected ({connected})", logging.INFO)
            time.sleep(next(pauses))
        return sorted(self._nodes)

    def exchange(
        self, instructions: RoundInstructions, sites: Sequence[str], deadline: float | None
    ) -> Iterator[Answer]:
        """Send instructions, then return the answers as they arrive; those missing at the deadline are late."""
        begun, server_round = time.monotonic(), instructions.server_round
        asked = {site: self._nodes[site] for site in sites if site in self._nodes}
        ttl = TTL if deadline is None else deadline + CLOCK_SLACK
        kind, content = "train" if instructions.train else "evaluate", pack_instructions(instructions)
        pushed = dict.fromkeys(asked, time.time())
        pending = {message_id: site for site, message_id in self._push(content, kind, asked, ttl).items()}

        def answers() -> Iterator[Answer]:
            for site in sorted(set(sites) - set(pending.values())):
                yield SiteFailure(site, server_round, "failed", "NotReached")
            until = begun + (TTL if deadline is None else deadline)
            with Puller(self._pull) as puller:
                pauses = _pauses()
                while pending:
                    self._check()
                    for message_id, message in puller(list(pending)):
                        pauses = _pauses()
                        if message_id not in pending:  # it was asked for again meanwhile
                            continue
                        answer = read_answer(message, pending.pop(message_id), server_round)
                        if isinstance(answer, SiteFailure) and answer.reason == "WrongName":
                            self._forget(asked[answer.site])
                        yield answer
                    if time.monotonic() >= until:
                        break
                    for message_id, site in self._lost(pending, asked, pushed):
                        told, about = (server_round, site), {"round": server_round, "site": site}
                        log.warning("round %d: the gate of %s was started anew; it is asked again", *told, extra=about)
                        del pending[message_id]
                        pushed[site] = time.time()
                        again = self._push(content, kind, {site: asked[site]}, ttl)
                        pending.update({new: label for label, new in again.items()})
                        if not again:
                            yield SiteFailure(site, server_round, "failed", "NotReached")
                    for message_id, site in self._shut_out(pending, asked, puller.stuck):
                        del pending[message_id]
                        yield SiteFailure(site, server_round, "failed", "NodeUnavailable")
                    if pending:
                        pause = max(next(pauses), SECONDS_PER_LOOK * len(pending))
                        time.sleep(max(min(pause, until - time.monotonic()), 0))
            yield from (SiteFailure(site, server_round, "late", "deadline") for site in sorted(pending.values()))

        return answers()

    def _lost(
        self, pending: Mapping[str, str], asked: Mapping[str, int], pushed: Mapping[str, float]
    ) -> list[tuple[str, str]]:
        """Messages whose node was started after they had been sent, with their sites."""
        if self._who is None:
            return []
        started = {node: member.started for node, member in self._who().items()}
        return [
            (message_id, site) for message_id, site in pending.items() if started.get(asked[site], 0.0) > pushed[site]
        ]

    def _shut_out(
        self, pending: Mapping[str, str], asked: Mapping[str, int], stuck: Collection[str]
    ) -> list[tuple[str, str]]:
        """Messages whose answer is stuck because the node's key was revoked meanwhile, with their sites."""
        if self._who is None or not stuck:
            return []
        known = self._who()
        return [
            (message_id, site)
            for message_id, site in pending.items()
            if message_id in stuck and asked[site] not in known
        ]

    def _everyone_was_heard(self) -> bool:
        """Ask new nodes who they are; True if none is still expected to say so."""
        now, online = time.monotonic(), set(self._grid.get_node_ids())
        if self._who is not None:
            self._nodes = {member.name: node for node, member in self._who().items() if node in online}
            return True
        strangers = {
            str(node): node
            for node in sorted(online - set(self._names))
            if now - self._asked.get(node, -ASK_AGAIN_SECONDS) >= ASK_AGAIN_SECONDS
        }
        if strangers:
            self._asked |= dict.fromkeys(strangers.values(), now)
            sent = self._push(RecordDict(), "query", strangers, TTL)
            self._queries |= {message_id: strangers[label] for label, message_id in sent.items()}
        for message_id in list(self._queries):
            if (message := self._pull(message_id)) is not None:
                self._introduce(self._queries.pop(message_id), message)
        self._nodes = {}
        for node, name in self._names.items():
            if node in online and self._nodes.setdefault(name, node) != node:
                self._tell(f"a second node says that it is {name}; it is ignored while the first one is connected")
        return not any(
            node in online and now - self._asked[node] < HELLO_SECONDS
            for node in self._queries.values()
            if node not in self._names
        )

    def _introduce(self, node: int, message: Message) -> None:
        site = None if message.has_error() else message.content.get("site")
        name = site.get("name") if isinstance(site, ConfigRecord) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            answer = read_answer(message, "?", 0)
            reason = answer.reason if isinstance(answer, SiteFailure) else "Unreadable"
            self._tell(f"node {node} did not say which site it is: {reason}; its own log knows more")
            return
        self._names[node] = name
        if isinstance(site, ConfigRecord) and site.get("version") != __version__:
            self._tell(f"site {name} runs fedseg {_code(site.get('version'))}, this server {__version__}")

    def _forget(self, node: int) -> None:
        self._names.pop(node, None)
        self._asked.pop(node, None)

    def _push(self, content: RecordDict, kind: str, nodes: Mapping[str, int], ttl: float) -> dict[str, str]:
        """Send one content to many nodes; returns the message ids by label, without those that Flower did not take."""
        messages = {label: Message(content, node, kind, ttl=ttl) for label, node in nodes.items()}
        if not messages:
            return {}
        taken = {message_id for message_id in self._grid.push_messages(list(messages.values())) if message_id}
        return {
            label: message.metadata.message_id
            for label, message in messages.items()
            if message.metadata.message_id in taken
        }

    def _pull(self, message_id: str) -> Message | None:
        """The answer to a message, if it is there; of an answer of which a part is there Flower waits for the rest."""
        for message in self._grid.pull_messages([message_id]):
            if message.metadata.reply_to_message_id == message_id:
                return message
        return None

    def _tell(self, text: str, level: int = logging.WARNING) -> None:
        """Log something once."""
        if text not in self._told:
            self._told.add(text)
            log.log(level, text)


def _pauses() -> Iterator[float]:
    pause, longest = POLL
    while True:
        yield pause
        pause = min(2 * pause, longest)
