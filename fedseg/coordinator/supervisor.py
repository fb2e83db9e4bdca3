"""Keeps a study running: the SuperLink, the registered keys, the run; whatever dies is started again.

A run that ended is submitted anew and goes on after its last committed round. What is known about that lies in one state folder
(`fedseg.coordinator.state`), so that a supervisor that was killed, or a machine that was restarted, goes on where it was.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fedseg.config import Experiment, load_experiment
from fedseg.coordinator.between import last_error
from fedseg.coordinator.exporter import serve
from fedseg.coordinator.fence import SUPERLINK_PORT, public_pem
from fedseg.coordinator.machine import MachineCollector
from fedseg.coordinator.state import RUN, finished, holder, is_held, query, rounds_done
from fedseg.coordinator.superlink import REVOKED, Control, start_superlink
from fedseg.errors import ConfigError, FedsegError, KitError, SuperLinkError
from fedseg.kit import Kit, Roster, load_roster
from fedseg.members import Member, read_who, write_who
from fedseg.processes import Backoff, end_process, is_port_taken, keep_short, only_one, start_process

log = logging.getLogger(__name__)

LOGS = ("superlink.log", "nginx.log", "nginx/access.log")
"""In the state folder; their writers let them grow for ever."""
LOOK_SECONDS = 0.5
"""Between two looks at everything."""
ADMIT_SECONDS = 2.0
"""Between two looks at the list of sites and at who is connected."""
WELL_SECONDS = 30.0
"""A trouble is over when everything has been running for so long; one that lasts is noticed again more often than that."""
START_SECONDS = 120.0
"""How long the SuperLink may take until it answers."""


@dataclass(frozen=True)
class Plan:
    """What is to be kept running."""

    kit: Kit
    state: Path
    """State folder."""
    port: int = SUPERLINK_PORT
    health_port: int = SUPERLINK_PORT + 1
    wait_for_sites: int = 0
    """Sites that must be connected before round 1; 0: the experiment's quorum."""
    wait_seconds: float = 86400.0
    """How long the ServerApp waits for them, and for the quorum in later rounds, before it gives up and is started again."""
    fence: bool = False
    """Run nginx too."""
    metrics_port: int | None = None
    """Answer Prometheus on this port; absent: not at all."""
    metrics_host: str = "127.0.0.1"
    web_config: Path | None = None
    """Who may ask there; see `fedseg.endpoint.listen`."""

    @property
    def run_directory(self) -> Path:
        """Where the ServerApp keeps its results."""
        return self.state / "run"

    @property
    def sites(self) -> Path:
        """Who is who, for the ServerApp."""
        return self.state / "sites.json"


@dataclass
class Supervisor:
    """Runs a plan until the study is finished or somebody stops it.

    Args:
        plan: what to run.
        tell: is told what happens, one sentence each, besides the log.
    """

    plan: Plan
    tell: Callable[[str], None] = lambda _: None
    stop: threading.Event = field(default_factory=threading.Event)
    _superlink: "subprocess.Popen[bytes] | None" = None
    _fence: "subprocess.Popen[bytes] | None" = None
    _control: Control | None = None
    _run_id: int | None = None
    _problem: str = ""
    _problem_began: float | None = None
    _problem_seen: float = 0.0
    _problem_over: bool = False
    _look_at_sites: float = 0.0
    _look_at_run: float = 0.0
    _fence_files: tuple[float, ...] = ()
    _links: Backoff = field(default_factory=Backoff)
    _runs: Backoff = field(default_factory=Backoff)
    _fences: Backoff = field(default_factory=Backoff)
    _held: bool = False
    _restarts: dict[str, int] = field(default_factory=lambda: {"superlink": 0, "run": 0, "fence": 0})

    def run(self) -> bool:
        """Keep everything running; True when the study is finished, False when it was stopped.

        Raises:
            ConfigError: the experiment does not fit the state folder, or another supervisor is running.
        """
        plan = self.plan
        experiment = load_experiment(plan.kit.experiment)
        plan.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        with only_one(plan.state / ".supervisor.lock", f"{plan.state}: another `fedseg server start` is running there"):
            _check_same_study(plan, experiment)
            bundle = plan.kit.app.read_bytes()
            _end_leftovers(plan.state)
            self._say(f"study {plan.kit.config.study}, experiment {experiment.name}, state in {plan.state}")
            if plan.metrics_port is not None:
                machine = MachineCollector(plan.kit, plan.state)
                server, _ = serve(
                    plan.run_directory, plan.metrics_host, plan.metrics_port, [machine], web_config=plan.web_config
                )
                self._say(f"the page to watch is {server.url}, series for Prometheus are on {server.url}metrics")
            try:
                while not self.stop.is_set():
                    if self._step(bundle):
                        self._write_status("finished")
                        return True
                    self._notice_recovery()
                    self._write_status("running")
                    self.stop.wait(LOOK_SECONDS)
                return False
            finally:
                self._shut_down()

    def _step(self, bundle: bytes) -> bool:
        """One look at everything; True if the study is finished."""
        if finished(self.plan.run_directory):
            return True
        for log_file in LOGS:
            keep_short(self.plan.state / log_file)
        try:
            if self.plan.fence:
                self._keep_fence()
            if self._keep_superlink():
                self._admit()
                self._keep_run(bundle)
        except (
            SuperLinkError,
            OSError,
        ) as error:  # a full disk, or a kit that is being replaced, must not end the study
            self._trouble(str(error))
        return False

    # ---------------------------------------------------------------------------------------------- SuperLink
    def _keep_superlink(self) -> bool:
        """True if it can be talked to."""
        if self._superlink is not None and self._superlink.poll() is None:
            if self._control is not None:
                return True
            end_process(self._superlink)  # something failed before it could be talked to
        if self._superlink is not None:
            self._close_control()
            pause = self._links.failed()
            self._restarts["superlink"] += 1
            self._say(f"the SuperLink has ended (exit code {self._superlink.returncode}); starting it in {pause:.0f} s")
            self._superlink, self._run_id, self._held = None, None, False
        if not self._links.over:
            return False
        plan = self.plan
        if is_port_taken(plan.port):  # else the other study's SuperLink would be taken for this one's
            self._links.failed()
            self._trouble(
                f"127.0.0.1:{plan.port} is taken by another program, perhaps by the server of another study; end it, or give "
                "this study another coordinator.superlink_port in its study file"
            )
            return False
        self._superlink = start_superlink(plan.kit, plan.state, port=plan.port, health_port=plan.health_port)
        (plan.state / "superlink.pid").write_text(str(self._superlink.pid))
        control = Control(plan.kit, plan.port)
        end = time.monotonic() + START_SECONDS
        while self._superlink.poll() is None and time.monotonic() < end and not self.stop.is_set():
            with contextlib.suppress(SuperLinkError):
                control.nodes()
                self._control, self._look_at_sites = control, 0.0
                self._say(f"the SuperLink listens on 127.0.0.1:{plan.port}")
                self._end_old_runs(control)
                return True
            self.stop.wait(0.2)
        control.close()
        if self._superlink.poll() is None:
            end_process(self._superlink)
        return False

    def _end_old_runs(self, control: Control) -> None:
        for run in control.runs():
            if run.status != "finished":
                control.stop(run.run_id)

    def _close_control(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None

    # ---------------------------------------------------------------------------------------------- sites
    def _admit(self) -> None:
        """Register the keys of the sites that may connect, shut the others out, write down who is who."""
        assert self._control is not None
        if time.monotonic() < self._look_at_sites:
            return
        self._look_at_sites = time.monotonic() + ADMIT_SECONDS
        try:
            roster = load_roster(self.plan.kit.roster)
        except FedsegError as error:  # half a copy perhaps; the last good list holds
            self._trouble(str(error))
            return
        write_who(self.plan.sites, self._members(roster, self._control))

    def _members(self, roster: Roster, control: Control) -> dict[int, Member]:
        wanted = {public_pem(site): site.name for site in roster.admitted(datetime.now(UTC))}
        members: dict[int, Member] = {}
        known: dict[int, str] = {}
        with contextlib.suppress(ConfigError):
            known = {node: member.name for node, member in read_who(self.plan.sites).items()}
        for node in control.nodes():
            if node.status == REVOKED:
                if node.public_key in wanted:
                    self._trouble(
                        f"{wanted.pop(node.public_key)}: its key was shut out before; renew it with a new key"
                    )
            elif node.public_key in wanted:
                members[node.node_id] = Member(wanted.pop(node.public_key), node.started)
            else:
                control.unregister(node.node_id)
                name = known.get(node.node_id, f"node {node.node_id}")
                self._say(f"{name} is shut out: its key is revoked, expired or unknown")
        for key, name in wanted.items():
            members[control.register(key, name)] = Member(name, 0.0)
            self._say(f"site {name} may connect")
        return members

    # ---------------------------------------------------------------------------------------------- run
    def _keep_run(self, bundle: bytes) -> None:
        assert self._control is not None
        if self._run_id is None:
            if self._runs.over and self._no_other_is_running():
                self._submit(bundle, self._control)
            return
        held = is_held(self.plan.run_directory)
        died = self._held and not held
        self._held = held
        if not died and (held or time.monotonic() < self._look_at_run):
            return
        self._look_at_run = time.monotonic() + ADMIT_SECONDS
        run = next((run for run in self._control.runs() if run.run_id == self._run_id), None)
        if run is None or run.status == "finished":
            if run is not None and run.outcome == "completed":
                return  # the store says so too, at the next look
            self._run_ended(f"{run.outcome}: {run.details}".rstrip(": ") if run else "it is unknown to the SuperLink")
        elif died:
            self._control.stop(self._run_id)
            self._run_ended("its process has died")

    def _submit(self, bundle: bytes, control: Control) -> None:
        plan = self.plan
        settings: dict[str, bool | float | str] = {
            "experiment": str(plan.kit.experiment.absolute()),
            "run-directory": str(plan.run_directory.absolute()),
            "sites": str(plan.sites.absolute()),
            "resume": True,
            "wait-for-sites": 0 if rounds_done(plan.run_directory) else plan.wait_for_sites,
            "wait-seconds": plan.wait_seconds,
        }
        self._run_id, self._held = control.submit(bundle, settings), False
        self._say(f"run {self._run_id} is submitted; it goes on after round {rounds_done(plan.run_directory)}")

    def _no_other_is_running(self) -> bool:
        """End a ServerApp that has outlived its SuperLink: it could not send anything, but it holds the run."""
        pid = holder(self.plan.run_directory)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pid is None

    def _run_ended(self, why: str) -> None:
        self._run_id, self._held = None, False
        self._restarts["run"] += 1
        pause = self._runs.failed(rounds_done(self.plan.run_directory))
        why = last_error(self.plan.run_directory) or why
        self._trouble(f"the run has ended: {why}; it is submitted again in {pause:.0f} s")

    # ---------------------------------------------------------------------------------------------- fence
    def _keep_fence(self) -> None:
        files = tuple((self.plan.kit.folder / name).stat().st_mtime_ns for name in ("nginx.conf", "crl.pem"))
        if self._fence is not None and self._fence.poll() is None:
            if files != self._fence_files:
                self._fence.send_signal(signal.SIGHUP)
                self._say("the fence reads its configuration anew")
            self._fence_files = files
            return
        if self._fence is not None:
            self._restarts["fence"] += 1
            pause = self._fences.failed()
            self._trouble(
                f"the fence has ended (exit code {self._fence.returncode}); it is started again in {pause:.0f} s; "
                f"{self.plan.state / 'nginx.log'} says why"
            )
            self._fence = None
        if not self._fences.over:
            return
        folder = self.plan.state / "nginx"
        folder.mkdir(exist_ok=True)
        command = ["nginx", "-c", str(self.plan.kit.folder.absolute() / "nginx.conf"), "-p", f"{folder.absolute()}/"]
        try:
            self._fence = start_process(command, self.plan.state / "nginx.log")
        except FileNotFoundError:
            raise ConfigError(
                "nginx is not installed; install it, or run the fence elsewhere (deploy/README.md)"
            ) from None
        self._fence_files = files

    # ---------------------------------------------------------------------------------------------- end and status
    def _say(self, text: str, level: int = logging.INFO) -> None:
        log.log(level, text)
        self.tell(text)

    def _trouble(self, problem: str) -> None:
        self._problem_seen = time.monotonic()
        if problem != self._problem or self._problem_over:
            self._problem, self._problem_began, self._problem_over = problem, time.time(), False
            self._say(problem, logging.WARNING)

    def _notice_recovery(self) -> None:
        fenced = not self.plan.fence or (self._fence is not None and self._fence.poll() is None)
        if not (fenced and self._control is not None and self._run_id is not None):
            self._problem_seen = time.monotonic()
        elif time.monotonic() - self._problem_seen > WELL_SECONDS:
            self._problem_over = True

    def _write_status(self, state: str) -> None:
        document = {
            "state": state,
            "study": self.plan.kit.config.study,
            "pid": os.getpid(),
            "time": time.time(),
            "superlink": self._superlink.pid if self._superlink is not None else None,
            "port": self.plan.port,
            "run_id": self._run_id,
            "rounds": rounds_done(self.plan.run_directory),
            "restarts": self._restarts,
            "problem": self._problem,
            "problem_began": self._problem_began,
            "problem_over": self._problem_over or state == "finished",
        }
        path = self.plan.state / "status.json"
        aside = path.with_name(".status.json.part")
        with contextlib.suppress(OSError):  # a full disk must not end the study
            aside.write_text(json.dumps(document))
            aside.replace(path)

    def _shut_down(self) -> None:
        if self._control is not None and self._run_id is not None:
            with contextlib.suppress(SuperLinkError):
                self._control.stop(self._run_id)
        self._close_control()
        for process in (self._superlink, self._fence):
            if process is not None:
                end_process(process)
        if self.stop.is_set():
            self._write_status("stopped")


def _check_same_study(plan: Plan, experiment: Experiment) -> None:
    rows = query(plan.run_directory, "SELECT digest, name FROM runs WHERE run = ?", RUN)
    if rows and rows[0][0] != experiment.digest():
        raise ConfigError(
            f"{plan.state}: holds the run of another experiment ({rows[0][1]}); choose another --state, or put the "
            f"former experiment back into {plan.kit.experiment}"
        )
    if not plan.kit.app.exists():
        raise KitError(f"{plan.kit.app}: is missing; provision again with --app")


def _end_leftovers(state: Path) -> None:
    """End a SuperLink and a fence that outlived their supervisor; their ports are needed."""
    for file in (state / "superlink.pid", state / "nginx" / "nginx.pid"):
        try:
            pid = int(file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if str(state.absolute()).encode() not in command:  # the number is another process' by now
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            for _ in range(50):
                os.kill(pid, 0)
                time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
