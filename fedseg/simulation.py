"""Simulate a scenario on one machine: federated runs, their baselines, and one honest comparison of all final models."""

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fedseg.config import Experiment
from fedseg.errors import StoreError
from fedseg.federated.checkpoint import load_state
from fedseg.federated.driver import Event, Fleet, run_federation
from fedseg.federated.local import Ask, InProcessFleet, WorkerFleet
from fedseg.federated.messages import Answer, RoundInstructions
from fedseg.federated.rounds import ServerState
from fedseg.federated.site import OpenSites, PooledSite, Site, answer_safely, start_state
from fedseg.federated.store import RunStore
from fedseg.model_file import save_model_file
from fedseg.scenario import Layout, Scenario, lay_out
from fedseg.scores import CaseRow, score_model, summarise, write_scores
from fedseg.site.config import SiteConfig

Engine = Literal["local", "flower"]


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
) -> dict[str, object]:
    """Run a scenario into a result directory.

    Args:
        scenario: sites, experiment, methods and baselines.
        output: receives `store.sqlite`, `checkpoints/`, `models/`, `scores.csv`, `result.json` and figures.
        machine: workers and devices.
        resume: go on with what the directory holds.
        show: is told of progress.

    Returns:
        What `result.json` holds.

    Raises:
        StoreError: the directory holds results and `resume` is False.
        QuorumError: a run had too few sites.
    """
    show = show or Silent()
    begun = time.monotonic()
    if not resume and (output / "store.sqlite").exists():
        raise StoreError(
            f"{output} holds results already; add --resume to go on, --overwrite to discard them, or choose another --output"
        )
    output.mkdir(parents=True, exist_ok=True)
    layout = _prepared(scenario, output, machine, show)
    (output / "scenario.json").write_text(scenario.model_dump_json(indent=2) + "\n")
    for method in scenario.methods:
        with _fleet(layout.sites, machine) as fleet:
            _run(
                scenario.experiment_of(method),
                method,
                output,
                fleet,
                resume,
                lambda event, run=method: show.event(run, event),
            )
    jobs = _baselines(scenario, layout)
    _run_baselines(jobs, scenario, output, machine, resume, show)
    models = {method: scenario.experiment_of(method) for method in scenario.methods} | {
        job.run: scenario.experiment for job in jobs
    }
    for run, experiment in models.items():
        save_model_file(
            output / "models" / f"{run}.safetensors",
            experiment,
            _final_state(output, run).weights,
            f"{scenario.experiment.name}/{run}",
        )
    rows = _score_all(models, layout, output, machine, show)
    write_scores(output / "scores.csv", rows)
    result = summarise(scenario, layout, rows, output) | {"seconds": round(time.monotonic() - begun, 1)}
    (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


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


@dataclass(frozen=True)
class _Baseline:
    """A run with a single site: all cases pooled, or one site on its own."""

    run: str
    sites: tuple[SiteConfig, ...]
    pooled: bool
    experiment: Experiment

    def ask(self) -> Ask:
        """A function that asks the one site."""
        opened = [Site(config) for config in self.sites]
        site = PooledSite(opened) if self.pooled else opened[0]

        def ask(name: str, instructions: RoundInstructions) -> Answer:
            return answer_safely(site, name, instructions)

        return ask

    @property
    def site_name(self) -> str:
        """The one site's name."""
        return PooledSite.NAME if self.pooled else self.sites[0].name


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
    return Layout(sites=sites, test=test)


@contextmanager
def _fleet(sites: Sequence[SiteConfig], machine: Machine) -> Iterator[Fleet]:
    names, opener = [site.name for site in sites], OpenSites(tuple(sites))
    if machine.engine == "flower":
        from fedseg.engines import ray_fleet  # Flower is slow to import, and Ray is an extra

        with ray_fleet(sites, machine.workers) as fleet:
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
        return run_federation(experiment, fleet, store, lambda: start_state(experiment), resume=resume, observe=observe)
    finally:
        store.close()


def _baselines(scenario: Scenario, layout: Layout) -> list[_Baseline]:
    plain = {"min_sites": 1, "participation": 1.0, "proximal_mu": 0.0, "aggregate": "mean", "server_optimizer": "average",
             "server_learning_rate": 1.0, "deadline": None}  # fmt: skip
    federation = scenario.experiment.federation.model_copy(update=plain)
    experiment = scenario.experiment.model_copy(update={"federation": federation})
    jobs = []
    if "pooled" in scenario.baselines:
        jobs.append(_Baseline("pooled", layout.sites, True, experiment))
    if "local" in scenario.baselines:
        jobs += [_Baseline(f"local-{site.name}", (site,), False, experiment) for site in layout.sites]
    return jobs


def _run_baseline(job: _Baseline, output: Path, resume: bool) -> None:
    _run(job.experiment, job.run, output, InProcessFleet([job.site_name], job.ask()), resume, lambda event: None)


def _run_baselines(
    jobs: list[_Baseline], scenario: Scenario, output: Path, machine: Machine, resume: bool, show: Show
) -> None:
    rounds = scenario.experiment.federation.rounds

    def watch() -> None:
        query = "SELECT run, MAX(server_round) AS done FROM rounds GROUP BY run"
        done = {row["run"]: row["done"] for row in store.rows(query)}
        for job in jobs:
            show.progress(job.run, done.get(job.run, 0), rounds)

    store = RunStore(output)
    try:
        _in_parallel([(_run_baseline, (job, output, resume)) for job in jobs], machine.workers, watch)
    finally:
        store.close()


def _score_all(
    models: dict[str, Experiment], layout: Layout, output: Path, machine: Machine, show: Show
) -> list[CaseRow]:
    """Score every model on the test cases of every site where it counts."""
    calls = []
    for run, experiment in models.items():
        sites = tuple(site for site in layout.sites if run in (f"local-{site.name}",)) or layout.sites
        calls.append((score_model, (output / "models" / f"{run}.safetensors", run, experiment, sites, layout.test)))
    finished = 0

    def watch() -> None:
        show.progress("evaluate", finished, len(calls))

    rows: list[CaseRow] = []
    for part in _in_parallel(calls, machine.workers, watch):
        rows += part  # type: ignore[arg-type]
    show.progress("evaluate", len(calls), len(calls))
    return rows


def _in_parallel(
    calls: Sequence[tuple[Callable[..., object], tuple[object, ...]]], workers: int, watch: Callable[[], None]
) -> list[object]:
    """The results of calls, in order, made in worker processes; `watch` is called twice a second."""
    if workers <= 1:
        results = []
        for function, arguments in calls:
            watch()
            results.append(function(*arguments))
        watch()
        return results
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedseg.simulation"])
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures: list[Future[object]] = [pool.submit(function, *arguments) for function, arguments in calls]
        try:
            while wait(futures, timeout=0.5).not_done:
                watch()
                for future in futures:
                    if future.done():
                        future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        watch()
        return [future.result() for future in futures]


def _final_state(output: Path, run: str) -> ServerState:
    store = RunStore(output, run)
    try:
        row = store.rows(
            "SELECT checkpoint, checkpoint_sha256 FROM rounds WHERE run = ? ORDER BY server_round DESC LIMIT 1", run
        )[0]
        return load_state(output / "checkpoints" / row["checkpoint"], row["checkpoint_sha256"])
    finally:
        store.close()
