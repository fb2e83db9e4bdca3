"""What the federations of a simulation sent over the wire."""

from pathlib import Path
from typing import Any

from fedseg.federated.store import RunStore

SHARE = 0.95


def traffic(output: Path, run: str) -> dict[str, Any]:
    """Arrays up and down in MB, and what one site's line carried until its federation was nearly as good as pooling.

    Args:
        output: result directory.
        run: a federated method.

    Returns:
        `megabytes_up` and `megabytes_down` of all sites, `updates` (how many were accepted), and `to_95`: the first evaluated
        `round` in which the sites' validation cases have 95 % of the Dice that the last pooled model gives them, and
        `megabytes_per_site` until then, up and down; None if no round has; no `to_95` if nothing was pooled.
    """
    store = RunStore(output, run)
    try:
        updates = store.rows(
            "SELECT COALESCE(SUM(bytes), 0) AS up, COUNT(*) AS n FROM updates WHERE run = ? AND status = 'accepted'",
            run,
        )[0]
        down = store.rows("SELECT COALESCE(SUM(bytes), 0) AS down FROM requests WHERE run = ?", run)[0]["down"]
        pooled = _validation(store, "pooled")
        nearly = {"to_95": _nearly_pooled(store, run, SHARE * pooled[max(pooled)])} if pooled else {}
    finally:
        store.close()
    return {
        "megabytes_up": updates["up"] / 1e6,
        "megabytes_down": down / 1e6,
        "updates": updates["n"],
        **nearly,
    }


def _nearly_pooled(store: RunStore, run: str, aim: float) -> dict[str, float] | None:
    reached = [number for number, dice in _validation(store, run).items() if dice >= aim]
    if not reached:
        return None
    first = min(reached)
    up = store.rows(
        "SELECT COALESCE(SUM(bytes), 0) AS up FROM updates WHERE run = ? AND server_round <= ?", run, first
    )[0]["up"]
    down = store.rows(
        "SELECT COALESCE(SUM(bytes), 0) AS down, COUNT(DISTINCT site) AS sites FROM requests WHERE run = ? AND server_round <= ?",
        run,
        first,
    )[0]
    return {"round": first, "megabytes_per_site": (up + down["down"]) / max(down["sites"], 1) / 1e6}


def _validation(store: RunStore, run: str) -> dict[int, float]:
    """Dice of all sites' validation cases together, by evaluated round."""
    rows = store.rows(
        """SELECT server_round, SUM(dice.value * cases.value) / SUM(cases.value) AS dice
           FROM metrics AS dice JOIN metrics AS cases USING (run, server_round, site)
           WHERE run = ? AND dice.name = 'dice' AND cases.name = 'cases' AND cases.value > 0 GROUP BY server_round""",
        run,
    )
    return {row["server_round"]: row["dice"] for row in rows}
