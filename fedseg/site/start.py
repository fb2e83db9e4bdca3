"""Site service and gate on one machine, and what answers Prometheus: kept running, each as a process of its own."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedseg.errors import ConfigError, KitError
from fedseg.kit import Kit
from fedseg.processes import Backoff, end_process, keep_short, only_one, start_process
from fedseg.site.config import SiteConfig, load_site

log = logging.getLogger(__name__)

STEADY_SECONDS = 120.0
"""A process that has lived so long starts with the shortest pause again."""


@dataclass
class _Kept:
    """One process, and when it may be started again."""

    name: str
    command: list[str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = None
    begun: float = 0.0
    again: Backoff = field(default_factory=Backoff)

    def start(self) -> None:
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "FLWR_LOG_LEVEL": "WARNING"}
        self.process = start_process(self.command, self.log, environment=environment)
        self.begun = time.monotonic()

    def ended(self) -> int | None:
        """Exit code of a process that has just ended."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        if time.monotonic() - self.begun > STEADY_SECONDS:
            self.again = Backoff()
        self.process = None
        self.again.failed()
        return code


@dataclass(frozen=True)
class Scraped:
    """Where the hospital's Prometheus finds the series of its site."""

    port: int
    host: str = "127.0.0.1"
    web_config: Path | None = None


@dataclass
class Household:
    """Keeps a hospital's two processes running until it is told to stop; a third one if somebody scrapes.

    Args:
        kit: the site's.
        site_file: the hospital's own decisions.
        tell: is told what happens, one sentence each.
        scraped: start what answers Prometheus, too.
    """

    kit: Kit
    site_file: Path
    tell: Callable[[str], None] = log.info
    stop: threading.Event = field(default_factory=threading.Event)
    scraped: Scraped | None = None

    def run(self) -> None:
        """Start both, start again what ends, end both.

        Raises:
            ConfigError: the site file is of another site, or both are running already.
            KitError: the kit is the coordinator's.
        """
        if self.kit.config.role != "site":
            raise KitError(f"{self.kit.folder}: is the coordinator's kit; use the one that was made for this hospital")
        config = load_site(self.site_file)
        require_own_name(self.kit, config)
        config.state_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # two gates with one key would shut each other out
        folder = config.state_folder
        with only_one(folder / ".start.lock", f"{folder}: another `fedseg site start` is running there"):
            self._keep_all(config)

    def _keep_all(self, config: SiteConfig) -> None:
        if not Path(config.data).is_dir():
            self.tell(
                f"{config.data}: no such folder; until it is there, the site fails every round (data in {self.site_file})"
            )
        fedseg = [sys.executable, "-m", "fedseg", "site"]
        socket = str(Path(config.socket).absolute())
        service = _Kept(
            "site service", [*fedseg, "serve", str(self.site_file)], config.state_folder / "site-service.log"
        )
        gate = _Kept(
            "gate",
            [*fedseg, "gate", str(self.kit.folder), "--socket", socket, "--home", str(config.state_folder / "gate")],
            config.state_folder / "gate.log",
        )
        more = [self._metrics(fedseg, socket, config.state_folder)] if self.scraped else []
        try:
            while not self.stop.is_set():
                for kept in (service, gate, *more):
                    self._keep(kept)
                self.stop.wait(0.5)
        finally:
            self.tell("ending gate and site service; the running step of training is waited for, 30 s at most")
            for kept in (gate, service, *more):  # the gate first, so that nothing new arrives
                if kept.process is not None:
                    end_process(kept.process, 30.0)
            self.tell("gate and site service have ended")

    def _metrics(self, fedseg: list[str], socket: str, folder: Path) -> _Kept:
        scraped = self.scraped
        assert scraped is not None
        command = [*fedseg, "metrics", str(self.kit.folder), "--socket", socket]
        command += ["--host", scraped.host, "--port", str(scraped.port)]
        if scraped.web_config is not None:
            command += ["--web-config", str(scraped.web_config)]
        return _Kept("answer to Prometheus", command, folder / "metrics.log")

    def _keep(self, kept: _Kept) -> None:
        keep_short(kept.log)
        code = kept.ended()
        if code is not None:
            self.tell(
                f"the {kept.name} has ended (exit code {code}); it is started again in {kept.again.pause:.0f} s; "
                f"its log is {kept.log}"
            )
        if kept.process is None and kept.again.over:
            kept.start()
            self.tell(f"the {kept.name} is running; its log is {kept.log}")


def require_own_name(kit: Kit, config: SiteConfig) -> None:
    """Check that kit and site file are of one site.

    Raises:
        ConfigError: they are not.
    """
    if config.name != kit.config.site:
        raise ConfigError(
            f"site.toml says name = {config.name!r}, the kit in {kit.folder} is that of {kit.config.site!r}; "
            f"write name = {kit.config.site!r}"
        )
