"""Simulate a scenario on one machine: federated runs, their baselines, and one honest comparison of all final models."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch

from fedseg import logs
from fedseg.case_rows import CaseRow, write_scores
from fedseg.config import Experiment
from fedseg.errors import StoreError
from fedseg.federated.checkpoint import load_state, write_durably
from fedseg.federated.ditto import personal_tensors
from fedseg.federated.driver import Event, Fleet, run_federation
from fedseg.federated.local import InProcessFleet, WorkerFleet, worker_pool
from fedseg.federated.machines import MachinePlan
from fedseg.federated.networks import private_of, start_state
from fedseg.federated.personal import Personal, personalise
from fedseg.federated.private import PrivateTensors
from fedseg.federated.rounds import ServerState
from fedseg.federated.site import Site
from fedseg.federated.sites import OpenSites, PooledSite, answer_safely
from fedseg.federated.store import RunStore
from fedseg.layout import Layout, lay_out
from fedseg.model_file import model_path, read_model_file, save_model_file, site_model_path
from fedseg.scenario import Scenario, personal
from fedseg.scores import score_once, summarise
from fedseg.site.config import SiteConfig

Engine = Literal["local", "flower"]
T = TypeVar("T")


class Show(Protocol):
    """Where a simulation tells what it is doing."""

    def event(self, run: str, event: Event) -> None:
        """Something happened in a federated run."""

    def progress(self, task: str, done: int, total: int) -> None:
        """A long task went on."""


class Silent:
    """Shows nothing."""

    def event(self, run: str, event: Event) -> None:
        """Ignore it."""

    def progress(self, task: str, done: int, total: int) -> None:
        """Ignore it."""


@dataclass(frozen=True)
class Machine:
    """On what a simulation runs.

    Args:
        workers: processes; results do not depend on their number.
        devices: dealt out to the sites in turn.
        threads: CPU threads of each site.
        engine: `local`, or `flower` for Flower's simulation on Ray.
    """

    workers: int = 1
    devices: tuple[str, ...] = ("cpu",)
    threads: int = 1
    engine: Engine = "local"


def simulate(
    scenario: Scenario, output: Path, machine: Machine, *, resume: bool = False, show: Show | None = None
) -> dict[str, Any]:
    """Run a scenario into a result directory.

    Args:
        scenario: sites, experiment, methods and baselines.
        output: receives `store.sqlite`, `checkpoints/`, `models/`, `scores.csv`, `scenario.json`, `layout.json` and
            `result.json`; where tensors stay at the sites (`federation.exchange`), also `private/` and a folder in `models/`
            with the model of each site.
        machine: workers and devices.
        resume: go on with what the directory holds.
        show: is told of progress.

    Returns:
        What `result.json` holds.

    Raises:
        StoreError: the directory holds results and `resume` is False.
        QuorumError: a run had too few sites.
        ConfigError: a method wants tensors to stay at the sites of which the network has none.
    """
    for method in scenario.methods:
        private_of(scenario.experiment_of(method))  # before hours of work on other methods
    show = show or Silent()
    begun = time.monotonic()
    if not resume:
        refuse_results(output)
    output.mkdir(parents=True, exist_ok=True)
    layout = _prepared(scenario, output, machine, show)
    _write_json(output / "scenario.json", scenario.model_dump(mode="json"))
    _write_json(output / "layout.json", layout.model_dump(mode="json"))
    for method in scenario.methods:
        experiment = scenario.experiment_of(method)
        _federate(experiment, method, layout.sites, scenario, output, machine, resume, show)
    left_out = layout.sites if "leave-one-out" in scenario.baselines else ()
    for absent in left_out:
        others = tuple(site for site in layout.sites if site is not absent)
        experiment = _of_fewer(scenario.experiment_of(next(iter(scenario.methods))), len(others))
        _federate(experiment, without(absent.name), others, scenario, output, machine, resume, show)
    if scenario.goes_on:
        _personalise_all(scenario, layout, output, machine, show)
    baselines = _baselines(scenario, layout)
    _run_baselines(baselines, scenario.experiment, output, machine, resume, show)
    runs = [*scenario.compared, *(without(site.name) for site in left_out), *baselines]
    rows = _score_all(runs, scenario.experiment, layout, output, machine, show)
    write_scores(output / "scores.csv", rows)
    result = summarise(scenario, layout, rows, output) | {"seconds": round(time.monotonic() - begun, 1)}
    _write_json(output / "result.json", result)
    return result


def without(site: str) -> str:
    """Name of the run from which a site was left out."""
    return f"without-{site}"


def _personalise_all(scenario: Scenario, layout: Layout, output: Path, machine: Machine, show: Show) -> None:
    """Have every site go on alone from the models of these methods; what is there already is left as it is."""
    paths = [
        (site, model_path(output, method, site.name), site_model_path(output, personal(method), site.name))
        for method in scenario.goes_on
        for site in layout.sites
    ]
    calls = [(site, source, target, scenario.personal_epochs) for site, source, target in paths if not target.exists()]
    _in_parallel(
        personalise_file, calls, machine.workers, lambda finished: show.progress("personalise", finished, len(calls))
    )


def personalise_file(site: SiteConfig, source: Path, target: Path, epochs: int) -> Personal:
    """Train on from a model file at a site, and write what the site keeps.

    Args:
        site: where the cases are.
        source: the federation's model, or the site's own of it.
        target: the model file to write.
        epochs: tried at most.
    """
    torch.set_num_threads(site.threads)
    model = read_model_file(source)
    found = personalise(Site(site), model, epochs)
    origin = f"{model.origin}, {found.kept}, at {site.name}"
    save_model_file(target, model.experiment, found.weights, origin, site=site.name, fingerprint=model.fingerprint)
    return found


def _of_fewer(experiment: Experiment, sites: int) -> Experiment:
    """The same for a federation of fewer sites."""
    federation = experiment.federation
    return experiment.model_copy(
        update={"federation": federation.model_copy(update={"min_sites": min(federation.min_sites, sites)})}
    )


def _federate(
    experiment: Experiment,
    run: str,
    sites: Sequence[SiteConfig],
    scenario: Scenario,
    output: Path,
    machine: Machine,
    resume: bool,
    show: Show,
) -> None:
    sites = _with_state(sites, output, run)
    plans = tuple(scenario.machine_plans([site.name for site in sites]).values())
    with _fleet(sites, plans, machine) as fleet:
        state = _run(experiment, run, output, fleet, resume, partial(show.event, run))
    _save_models(output, run, experiment, state, sites)


def refuse_results(output: Path) -> None:
    """Leave earlier results alone.

    Raises:
        StoreError: the folder holds some.
    """
    if (output / "store.sqlite").exists():
        raise StoreError(
            f"{output} holds results already; add --resume to go on, --overwrite to discard them, or choose another --output"
        )


def discard(output: Path) -> None:
    """Remove an earlier result directory.

    Raises:
        StoreError: the folder is not empty and holds no run store.
    """
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / "store.sqlite").exists():
        raise StoreError(f"{output}: is no result directory (it has no store.sqlite); it is left alone")
    shutil.rmtree(output)


def train_alone(
    experiment: Experiment,
    sites: Sequence[SiteConfig],
    run: str,
    output: Path,
    *,
    resume: bool = False,
    observe: Callable[[Event], None] = lambda _event: None,
) -> Path:
    """Train without a federation: one site, or several with their cases pooled.

    The same rounds, passes and learning rates as in the federation, but a single site, so that nothing is averaged.

    Args:
        experiment: its `federation` section is used for rounds and local epochs only.
        sites: whose cases to train on.
        run: name of the run in the result directory.
        output: receives the run and `models/<run>.safetensors`.
        resume: go on with what the directory holds.
        observe: is told what happens.

    Returns:
        The model file.
    """
    plain = experiment.federation.model_copy(update=_ALONE)
    experiment = experiment.model_copy(update={"federation": plain})
    opened = [Site(config) for config in sites]
    site = PooledSite(opened) if len(opened) > 1 else opened[0]
    fleet = InProcessFleet([site.config.name], lambda name, instructions: answer_safely(site, name, instructions))
    state = _run(experiment, run, output, fleet, resume, observe)
    path = model_path(output, run)
    save_model_file(path, experiment, state.weights, f"{experiment.name}/{run}", fingerprint=state.fingerprint)
    return path


_ALONE: dict[str, Any] = {
    "min_sites": 1,
    "participation": 1.0,
    "exchange": "all",
    "proximal_mu": 0.0,
    "control_variates": False,
    "normalise_steps": False,
    "personal_lambda": None,
    "aggregate": "mean",
    "server_optimizer": "average",
    "server_learning_rate": 1.0,
    "deadline": None,
}


def _prepared(scenario: Scenario, output: Path, machine: Machine, show: Show) -> Layout:
    """The layout, with every volume preprocessed once so that workers only open the cache."""
    layout = lay_out(scenario, output, threads=machine.threads)
    devices = machine.devices
    sites = tuple(
        site.model_copy(update={"device": devices[number % len(devices)]}) for number, site in enumerate(layout.sites)
    )
    for number, site in enumerate(sites):
        show.progress("preprocess", number, len(sites))
        Site(site).prepare(scenario.experiment)
    show.progress("preprocess", len(sites), len(sites))
    test = layout.test and layout.test.model_copy(update={"device": devices[0]})
    views = {name: view.model_copy(update={"device": devices[0]}) for name, view in layout.views.items()}
    return Layout(sites=sites, test=test, views=views)


def _with_state(sites: Sequence[SiteConfig], output: Path, method: str) -> tuple[SiteConfig, ...]:
    """The sites with a place for their private tensors that no other run shares."""
    state = str(output.resolve() / "private" / method)
    return tuple(site.model_copy(update={"state": state}) for site in sites)


@contextmanager
def _fleet(sites: Sequence[SiteConfig], plans: tuple[MachinePlan, ...], machine: Machine) -> Iterator[Fleet]:
    names, opener = [site.name for site in sites], OpenSites(tuple(sites), plans)
    if machine.engine == "flower":
        from fedseg.engines import ray_fleet  # Flower is slow to import, and Ray is an extra

        with ray_fleet(sites, machine.workers, plans) as fleet:
            yield fleet
    elif machine.workers <= 1:
        yield InProcessFleet(names, opener())
    else:
        with WorkerFleet(names, opener, machine.workers) as fleet:
            yield fleet


def _run(
    experiment: Experiment, run: str, output: Path, fleet: Fleet, resume: bool, observe: Callable[[Event], None]
) -> ServerState:
    store = RunStore(output, run)
    try:
        with logs.about(run=run):
            return run_federation(
                experiment, fleet, store, lambda: start_state(experiment), resume=resume, observe=observe
            )
    finally:
        store.close()


def _save_models(
    output: Path, method: str, experiment: Experiment, state: ServerState, sites: Sequence[SiteConfig]
) -> None:
    """Write the server's model, and each site's own if tensors stayed at the sites."""
    origin = f"{experiment.name}/{method}"
    save_model_file(model_path(output, method), experiment, state.weights, origin, fingerprint=state.fingerprint)
    document, alone = experiment.to_json(), experiment.federation.personal_lambda is not None
    for site in sites if state.private or alone else ():
        if alone:
            kept = personal_tensors(site.state_folder, document, site.name, state.weights)
        else:
            kept = PrivateTensors(site.state_folder, document, site.name, state.private)
        own = kept.latest() or {}  # a site that was never asked has the initial values, or what all share
        path = site_model_path(output, method, site.name)
        weights, told = state.weights | own, f"{origin}/{site.name}"
        save_model_file(path, experiment, weights, told, site=site.name, fingerprint=state.fingerprint)


def _baselines(scenario: Scenario, layout: Layout) -> dict[str, tuple[SiteConfig, ...]]:
    """The sites of each run without a federation."""
    runs: dict[str, tuple[SiteConfig, ...]] = {}
    if "pooled" in scenario.baselines:
        runs["pooled"] = layout.sites
    if "local" in scenario.baselines:
        runs |= {f"local-{site.name}": (site,) for site in layout.sites}
    return runs


def _run_baselines(
    runs: dict[str, tuple[SiteConfig, ...]],
    experiment: Experiment,
    output: Path,
    machine: Machine,
    resume: bool,
    show: Show,
) -> None:
    def watch(_finished: int) -> None:
        done = {
            row["run"]: row["done"]
            for row in store.rows("SELECT run, MAX(server_round) AS done FROM rounds GROUP BY run")
        }
        for run in runs:
            show.progress(run, done.get(run, 0), experiment.federation.rounds)

    store = RunStore(output)
    calls = [(experiment, sites, run, output) for run, sites in runs.items()]
    try:
        _in_parallel(partial(train_alone, resume=resume), calls, machine.workers, watch)
    finally:
        store.close()


def _score_all(
    runs: Sequence[str], experiment: Experiment, layout: Layout, output: Path, machine: Machine, show: Show
) -> list[CaseRow]:
    """Score every model on the test cases of every hospital where it counts."""
    calls = []
    for run in runs:
        models: dict[Path, list[str]] = {}
        for name in _where_it_counts(run, layout):
            models.setdefault(model_path(output, run, name), []).append(name)
        if len(models) == 1 and len(layout.sites) == len(next(iter(models.values()))):  # one network for everybody
            next(iter(models.values())).extend(layout.unseen)
        calls += [(path, run, experiment, layout, tuple(names)) for path, names in models.items()]
    score = partial(score_once, output / "scored")
    watch = partial(show.progress, "evaluate", total=len(calls))
    parts = _in_parallel(score, calls, machine.workers, watch)
    return [row for part in parts for row in part]


def _where_it_counts(run: str, layout: Layout) -> tuple[str, ...]:
    """Names of the sites: at home, where a site was left out of the federation, or everywhere."""
    names = tuple(site.name for site in layout.sites)
    return tuple(name for name in names if run in (f"local-{name}", without(name))) or names


def _in_parallel(
    function: Callable[..., T], calls: Sequence[tuple[object, ...]], workers: int, watch: Callable[[int], None]
) -> list[T]:
    """The results of calls, in order, made in worker processes; `watch` gets the number of finished ones twice a second.

    Raises:
        StoreError: a worker died.
    """
    if workers <= 1:
        results = []
        for number, arguments in enumerate(calls):
            watch(number)
            results.append(function(*arguments))
        watch(len(calls))
        return results
    with worker_pool(workers, "add --resume, with fewer --workers") as pool:
        futures = [pool.submit(function, *arguments) for arguments in calls]
        while wait(futures, timeout=0.5).not_done:
            finished = [future for future in futures if future.done()]
            watch(len(finished))
            for future in finished:
                future.result()
        results = [future.result() for future in futures]
        watch(len(calls))
        return results


def _final_state(output: Path, run: str) -> ServerState:
    store = RunStore(output, run)
    try:
        row = store.rows(
            "SELECT checkpoint, checkpoint_sha256 FROM rounds WHERE run = ? ORDER BY server_round DESC LIMIT 1", run
        )[0]
        return load_state(output / "checkpoints" / row["checkpoint"], row["checkpoint_sha256"])
    finally:
        store.close()


def _write_json(path: Path, document: object) -> None:
    write_durably(path, (json.dumps(document, indent=2) + "\n").encode())
