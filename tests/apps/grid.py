"""A Flower grid in this process."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity


@dataclass
class Node:
    """A SuperNode: its ClientApp, its configuration, and how it misbehaves."""

    app: ClientApp
    config: dict[str, str]
    online: bool = True
    silent: bool = False
    """It takes messages and never answers."""
    crash: int | None = None
    """Flower's error code, in place of an answer."""
    polls: int = 0
    """Answers come only after so many polls."""
    cut_off: threading.Event | None = None
    """Its answers are announced, and the rest of them arrives when this is set."""


@dataclass
class LoopGrid(Grid):
    """Carries messages to ClientApps in this process, through Flower's own bytes.

    It sets the one internal of Flower that a `Message` needs outside of Flower's programs: the identity of the task.
    """

    nodes: dict[int, Node]
    carried: list[bytes] = field(default_factory=list)
    """Everything that left a node."""
    most_pulled: int = 0
    _replies: dict[str, Message | None] = field(default_factory=dict)
    _owners: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def get_node_ids(self) -> list[int]:
        return [number for number, node in self.nodes.items() if node.online]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        taken = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            node = self.nodes[message.metadata.dst_node_id]
            if node.online:
                taken.append(message.metadata.message_id)
                self._owners[taken[-1]] = node
                self._replies[taken[-1]] = self._answer(node, message)
        return taken

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for message_id in message_ids:
            node = self._owners[message_id]
            node.polls -= 1
            if node.polls < 0 and self._replies[message_id] is not None:
                if node.cut_off is not None:
                    assert node.cut_off.wait(60)
                found.append(self._replies.pop(message_id))
        self.most_pulled = max(self.most_pulled, len(found))
        return found

    def _answer(self, node: Node, message: Message) -> Message | None:
        if node.silent:
            return None
        if node.crash is not None:
            return Message(Error(code=node.crash, reason="ValueError: /data/Mustermann_Max.nii.gz"), reply_to=message)
        context = Context(1, message.metadata.dst_node_id, node.config, RecordDict(), {})
        received, _ = over_the_wire(message)
        reply, sent = over_the_wire(node.app(received, context))
        self.carried += sent
        return reply

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> object:
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


def over_the_wire(message: Message) -> tuple[Message, list[bytes]]:
    """The message as Flower would rebuild it from bytes at the other end, and those bytes."""
    objects = {number: value.deflate() for number, value in get_all_nested_objects(message).items()}
    rebuilt = inflate_object_from_contents(message.object_id, dict(objects))
    assert isinstance(rebuilt, Message)
    rebuilt.metadata.__dict__["_message_id"] = message.metadata.message_id
    return rebuilt, list(objects.values())
