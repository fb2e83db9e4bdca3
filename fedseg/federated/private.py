"""The tensors that a site keeps to itself, on its own disk, from round to round.

Whoever trains for a site (this process, the next worker, the same machine after a restart) finds in these files what the
site had after the latest round before the one that is asked for. So a repeated round starts from what the first try
started from, and a resumed run ends with the same bits as one that never stopped.

What a site cannot see:

- Whether its answer arrived. If it came too late or was refused, and the round ended without it, the private tensors have
  taken that round's steps all the same.
- Which run asks. Files of an earlier run of the very same experiment are noticed by the weights that are sent for their
  round, or by a round to which no run goes back. They are not if the new run first asks this site in a later round than
  all of theirs.
"""

import hashlib
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedseg.errors import StoreError
from fedseg.federated.checkpoint import sync_directory, write_durably
from fedseg.federated.document import pack, unpack
from fedseg.federated.weights import FloatArray, Weights, digest

log = logging.getLogger(__name__)

FORMAT = 1
FILES_KEPT = 3
"""The server keeps two rounds to go back to; a site may be one round further."""
_NAME = re.compile(r"round-(\d+)\.safetensors")


class PrivateTensors:
    """Private tensors of one site in one experiment: a file for each of the last rounds that the site trained in.

    Args:
        state: the site's folder for what must outlive a round; made when something is saved.
        document: the experiment's JSON as the server sends it.
        site: name of the site.
        names: of the private tensors.
    """

    def __init__(self, state: Path, document: str, site: str, names: Collection[str]) -> None:
        self._experiment = hashlib.sha256(document.encode()).hexdigest()
        self.folder = state / self._experiment / site
        self._names = frozenset(names)

    def before(self, server_round: int, received: Weights) -> Weights | None:
        """What the site had when it began a round; None if it has not trained before.

        Args:
            server_round: the round that is asked for.
            received: the weights from which it starts.

        Raises:
            StoreError: a file is damaged or of another network.
        """
        known = [known for known in self._rounds() if known < server_round]
        if not known or self._is_of_another_run(server_round, received):
            return None
        return self._load(known[-1])[1]

    def latest(self) -> Weights | None:
        """What the site had after the last round that it trained in.

        Raises:
            StoreError: the file is damaged or of another network.
        """
        rounds = self._rounds()
        return self._load(rounds[-1])[1] if rounds else None

    def begin(self, server_round: int, received: Weights) -> None:
        """Remove what an earlier try at this round, or an earlier run of the same experiment, left behind."""
        stale = self._is_of_another_run(server_round, received)
        if stale:
            log.warning("%s: files of an earlier run of this experiment are removed", self.folder)
        for number in self._rounds():
            if stale or number >= server_round:
                self._path(number).unlink(missing_ok=True)
        for leftover in self.folder.glob(".round-*.part"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)

    def save(self, server_round: int, received: Weights, tensors: Mapping[str, FloatArray]) -> None:
        """Keep what the site has after a round, durably."""
        assert tensors.keys() == self._names
        if not self.folder.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            for parent in list(self.folder.parents)[:2]:
                sync_directory(parent)
        header = self._header(server_round) | {"received": digest(received)}
        write_durably(self._path(server_round), *pack(tensors, header))
        for number in self._rounds()[:-FILES_KEPT]:
            self._path(number).unlink(missing_ok=True)

    def _is_of_another_run(self, server_round: int, received: Weights) -> bool:
        """Whether the files cannot be of the run that asks for this round, even if it went back or repeats the round."""
        rounds = self._rounds()
        if server_round in rounds:
            return bool(self._load(server_round)[0]["received"] != digest(received))
        return bool(rounds) and rounds[-1] > server_round + 1

    def _rounds(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(found[1]) for path in self.folder.iterdir() if (found := _NAME.fullmatch(path.name)))

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round}.safetensors"

    def _header(self, server_round: int) -> dict[str, Any]:
        return {"format": FORMAT, "experiment_digest": self._experiment, "server_round": server_round}

    def _load(self, server_round: int) -> tuple[dict[str, Any], Weights]:
        path = self._path(server_round)
        try:
            header, tensors = unpack(path.read_bytes())
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{path}: not readable: {error}; remove it, and the site goes on with what it had before that round"
            ) from error
        if header.keys() != {*self._header(0), "received"} or not self._header(server_round).items() <= header.items():
            raise StoreError(f"{path}: is not of this experiment's round {server_round}; remove it")
        if tensors.keys() != self._names:
            raise StoreError(f"{path}: {sorted(tensors.keys() ^ self._names)[:4]} are missing or unknown; remove it")
        return header, tensors
