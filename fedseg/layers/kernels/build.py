"""Compiles a C++ source of this package at first use, and keeps the build in the user's cache folder.

A build's name stands for the source, the options, the processor and the compiler. Several processes may build at once:
each writes a file of its own and renames it.
"""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fedseg.errors import ModelError

_ALWAYS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
_MAYBE = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
"""Tried in this order: some compilers do not know the one, some have no library for the other."""

_TIMEOUT = 300


def find(source: Path) -> Path | None:
    """The newest build of a source for this machine; None: there is none, or it is another compiler's than today's."""
    folder = cache_folder()
    if folder is None:
        return None
    command = compiler()
    if command is None:
        builds = folder.glob(f"{_stem(source)}-*.so")
        return max(builds, key=lambda path: path.stat().st_mtime, default=None)
    build = folder / _name(source, command)
    return build if build.is_file() else None


def build(source: Path) -> Path:
    """Find or make a build of a source.

    Raises:
        ModelError: there is neither a build nor a compiler, or the compiler fails; says what it said.
    """
    found = find(source)
    if found is not None:
        return found
    command = compiler()
    if command is None:
        raise ModelError(NO_COMPILER)
    target = (cache_folder() or _private_folder()) / _name(source, command)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".so")
    os.close(handle)
    try:
        _compile(command, source, Path(temporary))
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


NO_COMPILER = "no C++ compiler: neither $CXX nor c++, g++ or clang++ is a program in $PATH"


def compiler() -> list[str] | None:
    """The command of this machine's C++ compiler: `$CXX`, which may hold options, else the first of the usual ones."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        program = shutil.which(command[0])
        if program is not None:
            return [program, *command[1:]]
    return None


def cache_folder() -> Path | None:
    """Where builds are kept; None if there is no folder that this user alone can write to."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "fedseg" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, RuntimeError):
        return None
    others_write = bool(state.st_mode & 0o022) or (hasattr(os, "getuid") and state.st_uid != os.getuid())
    return folder if os.access(folder, os.W_OK) and not others_write else None


@functools.cache
def _private_folder() -> Path:
    """A folder of this process, which goes when it does."""
    folder = tempfile.TemporaryDirectory(prefix="fedseg-kernels-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _compile(command: list[str], source: Path, target: Path) -> None:
    said = ""
    for options in _options():
        try:
            done = subprocess.run(
                [*command, *_ALWAYS, *options, "-o", str(target), str(source)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ModelError(f"{command[0]} could not compile {source.name}: {error}") from error
        if done.returncode == 0:
            return
        said = done.stderr.strip()
    raise ModelError(f"{command[0]} could not compile {source.name}: {said[-1000:] or 'it gave no reason'}")


def _options() -> tuple[tuple[str, ...], ...]:
    if sys.platform == "darwin":  # a second OpenMP beside torch's ends the process there
        return tuple(options for options in _MAYBE if "-fopenmp" not in options)
    return _MAYBE


def _stem(source: Path) -> str:
    """Stands for all but the compiler."""
    parts = (source.read_text(), repr((_ALWAYS, _options())), _processor())
    return f"{source.stem}-{_digest(*parts)}"


def _name(source: Path, command: list[str]) -> str:
    return f"{_stem(source)}-{_digest(*command, _version(tuple(command)))}.so"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


@functools.cache
def _processor() -> str:
    """What `-march=native` looks at."""
    described = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for kind in ("model name", "flags", "Features", "CPU part"):
        described += [line for line in lines if line.startswith(kind)][:1]
    return "\n".join(described)
