"""What deploy/ says, read into plain values that the tests can question."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
PROJECT = DEPLOY.parent
COMPOSE_FILES = sorted((DEPLOY / "compose").glob("*.yaml"))
DOCKERFILES = sorted(p for p in (DEPLOY / "docker").glob("Dockerfile.*") if p.suffix != ".dockerignore")
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
DIGEST = "sha256:" + "0" * 64


def compose(path: Path, **values: str) -> dict[str, Any]:
    """A compose file with its variables filled in: from `values`, its defaults, or something of the right kind."""

    def value(match: re.Match[str]) -> str:
        name, kind, text = match.groups()
        if name in values:
            return values[name]
        if kind == "-":
            return text
        return DIGEST if name.endswith("_DIGEST") else "example" if name.endswith("_IMAGE") else f"/srv/{name.lower()}"

    text = re.sub(r"\$\{(\w+)(?::([-?])([^}]*))?\}", value, path.read_text())
    return {key: part for key, part in yaml.safe_load(text).items() if not key.startswith("x-")}


def services() -> list[tuple[str, dict[str, Any]]]:
    """Every service of every compose file, as `file/name`."""
    return [(f"{p.stem}/{name}", service) for p in COMPOSE_FILES for name, service in compose(p)["services"].items()]


def rendered(folder: str, tmp_path: Path) -> list[dict[str, Any]]:
    """The objects that `kubectl kustomize` makes of a folder and an invented kit."""
    copy = tmp_path / folder
    shutil.copytree(DEPLOY / "kubernetes" / folder, copy, ignore=shutil.ignore_patterns("kit"))
    kustomization = yaml.safe_load((copy / "kustomization.yaml").read_text())
    (copy / "kit").mkdir()
    for generator in kustomization["secretGenerator"]:
        for name in generator["files"]:
            (copy / name).write_text("an invented file")
    command = ["kubectl", "kustomize", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "KUBECONFIG": ""})
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def manifests(folder: str) -> list[dict[str, Any]]:
    """The objects as they are written, before kustomize."""
    files = sorted((DEPLOY / "kubernetes" / folder).glob("*.yaml"))
    items = [item for path in files for item in yaml.safe_load_all(path.read_text())]
    return [item for item in items if item["kind"] != "Kustomization"]


def pods(items: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pod specifications by the name of their workload."""
    workloads = [item for item in items if item["kind"] == "StatefulSet"]
    return {item["metadata"]["name"]: item["spec"]["template"]["spec"] for item in workloads}


def unit(name: str) -> dict[str, list[str]]:
    """The [Service] section of a unit: every value of every key, in order."""
    settings: dict[str, list[str]] = {}
    section = ""
    for line in (DEPLOY / "systemd" / f"{name}.service").read_text().splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and not line.startswith("#"):
            key, text = line.split("=", 1)
            settings.setdefault(key, []).append(text)
    return settings


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile."""

    word: str
    rest: str


def dockerfile(path: Path) -> list[Instruction]:
    """The instructions of a Dockerfile, continuation lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(None, 1)) for line in joined.splitlines() if line.strip()]
