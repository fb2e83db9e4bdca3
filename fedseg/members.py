"""Which site is behind which of Flower's nodes: written down by the supervisor, read by the ServerApp and whoever watches."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fedseg.errors import ConfigError
from fedseg.federated.checkpoint import write_durably


@dataclass(frozen=True)
class Member:
    """A site whose key is registered."""

    name: str
    """Of the site that owns the key."""
    started: float
    """When its SuperNode was started last, in seconds since 1970; what it was asked before that is lost. 0: never."""


def write_who(path: Path, members: Mapping[int, Member]) -> None:
    """Say which site owns the key of which node; an unchanged file is left alone."""
    document = json.dumps({str(node): asdict(member) for node, member in sorted(members.items())}, indent=1).encode()
    if not path.exists() or path.read_bytes() != document:
        write_durably(path, document)


def read_who(path: Path) -> dict[int, Member]:
    """The sites by number of their node.

    Raises:
        ConfigError: it is another file.
    """
    try:
        document = json.loads(path.read_bytes())
        members = {int(node): Member(**member) for node, member in document.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: is no list of sites by node: {error}") from error
    names = [member.name for member in members.values()]
    if not all(isinstance(member.name, str) and type(member.started) is float for member in members.values()) or (
        len(set(names)) != len(names)
    ):
        raise ConfigError(f"{path}: each node needs the name of a site and a time, each site one node")
    return members
