"""What a person wants to know about a running study, read from its state folder; nothing is asked over the network."""

import contextlib
import json
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedseg.coordinator.state import RUN, query
from fedseg.errors import ConfigError
from fedseg.members import read_who


def overview(state: Path) -> dict[str, Any]:
    """Rounds and sites of a study.

    Args:
        state: the supervisor's state folder.

    Returns:
        `of`: number of rounds; `sites`: for each its `name`, `node` (connected or not), last `round`, when it was `seen` (seconds
        since 1970), its `dice` and what it `said` last.
    """
    run = state / "run"
    rows = query(run, "SELECT experiment FROM runs WHERE run = ?", RUN)
    rounds = json.loads(rows[0][0])["federation"]["rounds"] if rows else None
    try:
        members = read_who(state / "sites.json")
    except ConfigError:
        members = {}
    online = online_nodes(state / "superlink.db")
    sites = []
    for node, member in sorted(members.items(), key=lambda item: item[1].name):
        name = member.name
        last = query(
            run,
            "SELECT u.server_round, u.status, u.reason, r.finished FROM updates u JOIN rounds r USING (run, server_round) "
            "WHERE u.run = ? AND u.site = ? ORDER BY u.server_round DESC LIMIT 1",
            RUN,
            name,
        )
        dice = query(
            run,
            "SELECT value FROM metrics WHERE run = ? AND site = ? AND name = 'dice' ORDER BY server_round DESC LIMIT 1",
            RUN,
            name,
        )
        server_round, status, reason, seen = last[0] if last else (None, "", None, None)
        sites.append(
            {
                "name": name,
                "node": "yes" if node in online else "no",
                "round": server_round,
                "seen": seen,
                "dice": dice[0][0] if dice else None,
                "said": f"{status} ({reason})" if reason else status,
            }
        )
    return {"of": rounds, "sites": sites}


def online_nodes(database: Path) -> set[int]:
    """Nodes from which the SuperLink has heard lately."""
    if not database.exists():
        return set()
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as opened,
    ):
        rows = opened.execute(
            "SELECT node_id FROM node WHERE status = 'online' AND online_until > ?", (datetime.now(UTC).timestamp(),)
        )
        return {node % 2**64 for (node,) in rows}
    return set()
