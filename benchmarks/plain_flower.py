"""Flower as it comes, without encryption: a SuperLink, SuperNodes and a run, as processes. What benchmarks compare with."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from tests.integration.study import end, family

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


class Deployment:
    """Starts processes, each with its own FLWR_HOME and log, and ends them and all that they started.

    Args:
        folder: for logs and Flower's files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._files = ExitStack()

    def start_superlink(self) -> None:
        """Start the server and wait until it listens."""
        command = "flower-superlink --insecure --disable-runtime-dependency-installation --host 127.0.0.1 --port"
        self.start("superlink", [*command.split(), str(self.port)])
        self.wait_until(lambda: is_listening(self.port), 60, "the SuperLink listens")

    def start_supernode(self, name: str, site_file: Path) -> None:
        """Start a hospital's SuperNode."""
        command = f"flower-supernode --insecure --superlink 127.0.0.1:{self.port} --port {free_port()} --node-config"
        self.start(name, [*command.split(), f'site="{site_file}"'])

    def start_run(self, settings: Mapping[str, object], app: Path = ROOT) -> None:
        """Submit an app as the coordinator does, and follow its log."""
        home = self.folder / "run"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        self.start("run", ["flwr", "run", str(app), "here", "--stream", "--run-config", config])

    def start(self, name: str, command: list[str]) -> None:
        """Start a program of this environment in a session of its own."""
        environment = os.environ | {
            "FLWR_HOME": str(self.folder / name),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        log = self._files.enter_context((self.folder / f"{name}.log").open("wb"))
        self._processes[name] = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=self.folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def stop(self, *names: str) -> None:
        """End processes: ask them and what they started, then insist."""
        pids = {pid for name in names for pid in family(self._processes[name].pid)}
        for name in names:
            self._processes[name].terminate()
        for name in names:
            try:
                self._processes[name].wait(10)
            except subprocess.TimeoutExpired:
                continue
        for pid in pids:
            end(pid)
        for name in names:
            self._processes.pop(name).wait(10)

    def close(self) -> None:
        """End everything."""
        self.stop(*self._processes)
        self._files.close()

    def log(self, name: str) -> str:
        """What a process has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait_until(self, happened: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for something; fail with the end of every log if it does not happen or a process dies."""
        end_time = time.monotonic() + seconds
        while not happened():
            dead = [name for name, process in self._processes.items() if process.poll()]
            if dead or time.monotonic() > end_time:
                why = f"{', '.join(dead)} died" if dead else f"{seconds:.0f} s have passed"
                tails = [f"--- {log.stem}\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs()]
                raise AssertionError(f"waited until {what}, but {why}\n" + "\n".join(tails))
            time.sleep(0.1)

    def finished(self, name: str) -> bool:
        """Whether a process has ended without an error."""
        return self._processes[name].poll() == 0

    def logs(self) -> list[Path]:
        """All logs."""
        return sorted(self.folder.glob("*.log"))


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_listening(port: int) -> bool:
    """Whether somebody does."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
