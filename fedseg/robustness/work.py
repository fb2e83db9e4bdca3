"""Measure what is missing, over worker processes; what is finished is kept, whatever happens then."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

from fedseg.federated.local import PRELOAD, worker_pool
from fedseg.processes import only_one
from fedseg.robustness.measure import Measured, Unit, measure
from fedseg.robustness.networks import Network
from fedseg.robustness.store import Found, RobustnessStore
from fedseg.robustness.views import View

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Wish:
    """Networks to be measured in a view."""

    view: View
    networks: tuple[Network, ...]
    doubt: bool = False
    """Measure their uncertainty too."""


def fulfil(
    wishes: Sequence[Wish],
    store: Path,
    *,
    workers: int = 1,
    device: str = "cpu",
    surface: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> Found:
    """Measure all that is wished for and not there yet.

    Args:
        wishes: which networks on what.
        store: the file of measurements.
        workers: processes; results do not depend on their number.
        device: where networks are computed.
        surface: HD95 and surface Dice too; what was measured without them is measured again.
        progress: called with the number of cases that are finished, and their total.

    Returns:
        All measurements of the store.

    Raises:
        ConfigError: another process is at it.
        StoreError: the file is damaged, or a worker process died.
    """
    with only_one(store.with_suffix(".lock"), f"{store}: another process is measuring; wait for it, or end it"):
        kept = RobustnessStore(store)
        try:
            units = missing(wishes, kept.read(), device=device, surface=surface)
            progress(0, len(units))
            for done, (unit, measured) in enumerate(_measured(units, workers), 1):
                kept.add(unit.view, unit.case.name, measured)
                progress(done, len(units))
            return kept.read()
        finally:
            kept.close()


def missing(wishes: Sequence[Wish], found: Found, *, device: str, surface: bool) -> list[Unit]:
    """What is still to be done, one unit for each case and view; views that are the same are one."""
    joined: dict[str, tuple[View, dict[Network, bool]]] = {}
    for wish in wishes:
        _, networks = joined.setdefault(wish.view.key, (wish.view, {}))
        for network in wish.networks:
            networks[network] = networks.get(network, False) or wish.doubt
    units = []
    for key, (view, networks) in joined.items():
        for case in view.cases:
            if case.name in found.skipped.get(key, {}):
                continue
            to_score, to_doubt = [], []
            for network, doubt in networks.items():
                scored = found.scored.get((network.sha256, key), {}).get(case.name)
                if scored is None or (surface and any(one.hd95 != one.hd95 for one in scored.labels.values())):
                    to_score.append(network)
                if doubt and case.name not in found.doubts.get((network.sha256, key), {}):
                    to_doubt.append(network)
            if to_score or to_doubt:
                units.append(Unit(key, case, view.shift, tuple(to_score), tuple(to_doubt), surface, device))
    return units


def _measured(units: Sequence[Unit], workers: int) -> Iterator[tuple[Unit, Measured]]:
    """In the order in which they get finished."""
    if workers <= 1 or len(units) <= 1:
        yield from ((unit, measure(unit)) for unit in units)
        return
    remedy = "start again with fewer --workers, what was measured is kept"
    with worker_pool(min(workers, len(units)), remedy, (*PRELOAD, "fedseg.robustness.measure")) as pool:
        futures = {pool.submit(measure, unit): unit for unit in units}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
