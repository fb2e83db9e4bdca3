"""A whole study on this machine: kits, the fence, the SuperLink, gates and site services, each a real process."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from fedseg.config import Experiment
from fedseg.data.phantom import PhantomConfig, write_phantoms
from fedseg.site.supernode import free_port
from tests.apps.hospitals import NAMES, short_socket, write_experiment

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.executable)


class Study:
    """Provisions a study and starts, stops, freezes and kills its processes.

    Args:
        folder: for kits, data and logs.
        experiment: what is run.
        names: of the sites.
        phantoms: give them volumes.
        metrics: have the server answer Prometheus.
    """

    def __init__(
        self,
        folder: Path,
        experiment: Experiment,
        names: tuple[str, ...] = NAMES,
        *,
        phantoms: bool = True,
        metrics: bool = True,
    ) -> None:
        self.folder, self.names = folder, names
        self.port, self.superlink_port, self.health_port = free_port(), free_port(), free_port()
        self.metrics_port, self._metrics = free_port(), metrics
        self.site_metrics_ports = {name: free_port() for name in names}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._files = ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        write_experiment(folder / "experiment.toml", experiment)
        (folder / "study.toml").write_text(
            f'name = "{experiment.name}"\nexperiment = "experiment.toml"\n'
            f'[coordinator]\nhost = "127.0.0.1"\nlisten = "127.0.0.1"\n'
            f"port = {self.port}\nsuperlink_port = {self.superlink_port}\n"
            + "".join(f'[[sites]]\nname = "{name}"\n' for name in names)
        )
        self.fedseg("provision", folder / "study.toml", "-o", self.kits)
        for number, name in enumerate(names):
            if phantoms:
                write_phantoms(self.data(name), PhantomConfig(cases=3, shape=(16, 20, 20), first=10 * number))
            self.write_site(name)
            self.fedseg("site", "approve", self.site(name) / "app.fab", "--yes")

    @property
    def kits(self) -> Path:
        return self.folder / "kits"

    @property
    def coordinator(self) -> Path:
        return self.kits / "coordinator"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def run(self) -> Path:
        return self.state / "run"

    def site(self, name: str) -> Path:
        return self.kits / "sites" / name

    def data(self, name: str) -> Path:
        return self.folder / "data" / name

    def write_site(self, name: str, **policy: Any) -> None:
        """A site file as a hospital would write it; few cases are allowed here."""
        rules = {"min_cases": 1, "min_validation_cases": 1} | policy
        (self.site(name) / "site.toml").write_text(
            f'name = "{name}"\ndata = "{self.data(name)}"\ncache = "cache"\nstate = "state"\ndevice = "cpu"\n'
            f'socket = "{short_socket()}"\n[policy]\n'
            + "".join(f"{key} = {json.dumps(value)}\n" for key, value in rules.items())
        )

    # -------------------------------------------------------------------------------------------- processes
    def start_server(self, command: str = "start") -> None:
        """What the coordinator starts: SuperLink, run, fence and series."""
        more = ["--metrics", self.metrics_port] if self._metrics else []
        more += ["--wait-for-sites", len(self.names)] if command == "start" else []
        self.start(
            "server", "server", command, self.coordinator, "--state", self.state, "--health", self.health_port,
            "--fence", *more,
        )  # fmt: skip

    def start_service(self, name: str) -> None:
        """A site service without the network, where the system allows that."""
        self.start(f"{name}-service", "site", "serve", self.site(name) / "site.toml")

    def start_gate(self, name: str) -> None:
        """A gate."""
        self.start(f"{name}-gate", "site", "gate", self.site(name))

    def start_metrics(self, name: str) -> None:
        """What answers the hospital's own Prometheus."""
        self.start(f"{name}-metrics", "site", "metrics", self.site(name), "--port", self.site_metrics_ports[name])

    def start(self, label: str, *arguments: object) -> None:
        """Start `fedseg` in a session of its own."""
        self.start_program(label, [str(PYTHON), "-m", "fedseg", *map(str, arguments)])

    def start_program(self, label: str, command: list[str]) -> None:
        """Start any program in a session of its own."""
        log = self._files.enter_context((self.folder / f"{label}.log").open("ab"))
        self._processes[label] = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def pid(self, label: str) -> int:
        """Of a process that was started here."""
        return self._processes[label].pid

    def family(self, label: str) -> set[int]:
        """A process and all that it has started."""
        return family(self._processes[label].pid)

    def signal(self, label: str, number: int) -> None:
        """Send a signal to a process and all that it has started."""
        for pid in self.family(label):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self, label: str, patience: float = 20.0) -> int:
        """Ask a process to end; returns its exit code."""
        pids, process = self.family(label), self._processes.pop(label)
        process.terminate()
        try:
            return process.wait(patience)
        finally:
            for pid in pids:
                end(pid)

    def kill(self, label: str, *, family: bool = False) -> None:
        """SIGKILL, for the process alone or for all that it has started."""
        pids, process = self.family(label) if family else set(), self._processes.pop(label)
        process.kill()
        process.wait()
        for pid in pids:
            end(pid)

    def kill_part(self, label: str, program: str) -> None:
        """SIGKILL, for a program that a process has started."""
        os.kill(next(pid for pid in self.family(label) if program in command_of(pid)), signal.SIGKILL)

    def ended(self, label: str) -> int | None:
        """Exit code of a process that has ended by itself."""
        return self._processes[label].poll()

    def close(self) -> None:
        """End everything."""
        pids = {pid for label in self._processes for pid in self.family(label)}
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        for pid in pids:
            end(pid)
        self._files.close()

    def fedseg(self, *arguments: object) -> str:
        """Run a command to its end."""
        done = subprocess.run(
            [str(PYTHON), "-m", "fedseg", *map(str, arguments)],
            cwd=self.folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"fedseg {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}"
        return done.stdout

    # -------------------------------------------------------------------------------------------- what happened
    def rows(self, query: str, *values: object) -> list[dict[str, Any]]:
        """Rows of the run store; none while it is being made."""
        return rows(self.run, query, *values)

    def answers(self, site: str, after: int) -> list[tuple[str, str | None]]:
        """How a site's requests ended in the rounds after one."""
        query = "SELECT status, reason FROM updates WHERE site = ? AND server_round > ? ORDER BY server_round"
        return [(row["status"], row["reason"]) for row in self.rows(query, site, after)]

    def accepted(self, site: str, after: int) -> bool:
        """Whether an update of a site was accepted after a round."""
        return ("accepted", None) in self.answers(site, after)

    def rounds(self) -> int:
        """Number of finished rounds."""
        found = self.rows("SELECT max(server_round) AS n FROM rounds")
        return int(found[0]["n"] or 0) if found else 0

    def log(self, label: str) -> str:
        """What a process has printed."""
        path = self.folder / f"{label}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def server_log(self) -> str:
        """What the ServerApp has written into the run directory."""
        path = self.run / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, happened: Callable[[], Any], seconds: float, what: str) -> float:
        """Wait for something; returns how long it took, or fails with the end of every log."""
        begun = time.monotonic()
        while not happened():
            if time.monotonic() - begun > seconds:
                raise AssertionError(f"{what}: not within {seconds:.0f} s\n{self.story()}")
            time.sleep(0.1)
        return time.monotonic() - begun

    def wait_for_round(self, number: int, seconds: float = 90.0) -> float:
        """Wait until a round is finished."""
        return self.wait_for(lambda: self.rounds() >= number, seconds, f"round {number} is finished")

    def story(self) -> str:
        """The end of every log, for whoever has to find out why a test failed."""
        logs = [*sorted(self.folder.glob("*.log")), self.run / "server.log", self.state / "superlink.log"]
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-2500:]}" for path in logs if path.exists()
        )


def rows(run: Path, query: str, *values: object) -> list[dict[str, Any]]:
    """Rows of a run store that another process writes."""
    if not (run / "store.sqlite").exists():
        return []
    try:
        with closing(sqlite3.connect(f"file:{run / 'store.sqlite'}?mode=ro", uri=True, timeout=10)) as database:
            cursor = database.execute(query, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]
    except sqlite3.OperationalError:
        return []


def environment() -> Mapping[str, str]:
    """For the programs: one thread, no telemetry, and a place for Flower's files that is not the user's."""
    return os.environ | {
        "FLWR_HOME": str(Path(tempfile.gettempdir()) / "fedseg-no-flower-home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }


def family(pid: int) -> set[int]:
    """A process and its descendants; Flower gives some of them sessions of their own."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found


def command_of(pid: int) -> str:
    """Command line of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def end(pid: int) -> None:
    """Kill a process if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def devices(pid: int) -> set[str]:
    """Network devices that a process sees."""
    return {line.split(":")[0].strip() for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]}
