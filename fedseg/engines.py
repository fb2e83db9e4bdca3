"""Flower's simulation engine: the sites of a scenario as actors on Ray, for machines with many GPUs, and for many machines.

The rounds run where they always run, in the caller's thread; Ray carries the messages. Each actor keeps the sites that it
has been. With the environment variable RAY_ADDRESS an existing cluster is used as it is.
"""

import importlib.util
import logging
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

from fedseg import __version__, logs
from fedseg.errors import ConfigError, QuorumError
from fedseg.federated.local import Ask
from fedseg.federated.machines import MachinePlan
from fedseg.federated.messages import RoundInstructions, SiteUpdate
from fedseg.federated.sites import OpenSites
from fedseg.flower import FlowerFleet, reply_to
from fedseg.site.config import SiteConfig
from fedseg.site.connect import Refusal

START_SECONDS = 120.0
"""How long Ray and its actors may take to start."""


@contextmanager
def ray_fleet(
    sites: Sequence[SiteConfig], workers: int, machines: tuple[MachinePlan, ...] = ()
) -> Iterator[FlowerFleet]:
    """Sites that are reached through Flower's simulation engine.

    Args:
        sites: the sites. A device such as `cuda:1` becomes `cuda`: Ray deals out the GPUs.
        workers: actors on this machine; on a cluster there are as many as it has CPUs.
        machines: of simulated hospitals. Flower's messages know no lateness: who misses the virtual deadline has failed.

    Raises:
        ConfigError: Ray is not installed.
        QuorumError: the engine did not start, or ended while sites were being asked.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError('engine "flower" needs Ray, which is not installed: pip install "fedseg[ray]"')
    configs = tuple(site.model_copy(update={"device": site.device.partition(":")[0]}) for site in sites)
    opener = OpenSites(configs, machines)
    devices = sorted({site.device for site in sites if site.device.startswith("cuda")})
    with _quiet_environment():
        engine = _Engine(opener, _backend(workers, len(devices)))
        try:
            grid = engine.grid()
            yield FlowerFleet(grid, min_sites=len(sites), patience=START_SECONDS, check=engine.check)
        finally:
            engine.stop()


class _Engine:
    """Flower's engine in a thread of its own, so that an error in a round reaches whoever started the run."""

    def __init__(self, opener: OpenSites, backend: dict[str, Any]) -> None:
        self._grids: queue.Queue[Any] = queue.Queue()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(opener, backend), name="flower-engine", daemon=True)
        self._thread.start()

    def grid(self) -> Any:
        """The grid that reaches the sites."""
        while True:
            self.check()
            try:
                return self._grids.get(timeout=0.2)
            except queue.Empty:
                continue

    def check(self) -> None:
        """Raise if the engine has ended."""
        if not self._thread.is_alive():
            raise QuorumError(f"Flower's simulation engine ended: {_root(self._error)}") from self._error

    def stop(self) -> None:
        """End the engine, and Ray with it."""
        self._done.set()
        self._thread.join(60)
        import ray

        ray.shutdown()

    def _run(self, opener: OpenSites, backend: dict[str, Any]) -> None:
        from flwr.app import Context
        from flwr.serverapp import Grid, ServerApp
        from flwr.simulation import run_simulation

        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower's signature
            self._grids.put(grid)
            self._done.wait()

        try:
            run_simulation(server, _client_app(opener), len(opener.configs), backend_config=backend)
        except BaseException as error:  # handed to the thread that waits for answers
            self._error = error
        finally:
            self._done.set()


@dataclass(frozen=True)
class _WarmSite:
    """A site in an actor."""

    opener: OpenSites
    site: str
    version: str = __version__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def describe(self) -> Self:
        return self

    def ask(self, instructions: bytes, *, train: bool) -> bytes | Refusal:  # noqa: ARG002 - the instructions say it too
        answer = _opened(self.opener)(self.site, RoundInstructions.decode(instructions))
        return answer.encode() if isinstance(answer, SiteUpdate) else Refusal(answer.kind, answer.reason)


@lru_cache(maxsize=1)
def _opened(opener: OpenSites) -> Ask:
    """The actor's sites, with their network and their volumes, kept from message to message."""
    return opener()


def _client_app(opener: OpenSites) -> Any:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    @app.train()
    @app.evaluate()
    def answer(message: Message, context: Context) -> Message:
        config = opener.configs[int(context.node_config["partition-id"])]
        return reply_to(message, lambda: _WarmSite(opener, config.name))

    return app


def _root(error: BaseException | None) -> str:
    """What went wrong first; Flower wraps it twice."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return str(error or "without an error")


def _backend(workers: int, gpus: int) -> dict[str, Any]:
    init: dict[str, Any] = {"logging_level": "error", "log_to_driver": not logs.is_json(), "include_dashboard": False}
    if "RAY_ADDRESS" not in os.environ:
        init["num_cpus"] = workers
    return {"init_args": init, "client_resources": {"num_cpus": 1, "num_gpus": min(1.0, gpus / workers)}}


@contextmanager
def _quiet_environment() -> Iterator[None]:
    """No telemetry, no usage reports, no chatter; what Flower changes in the environment is put back."""
    settings = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOG_LEVEL": "ERROR",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    before, logger = dict(os.environ), logging.getLogger("flwr")
    level = logger.level
    os.environ.update(settings)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for key in set(os.environ) - set(before):
            del os.environ[key]
        os.environ.update(before)
