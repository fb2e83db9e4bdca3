"""Every `fedseg ...` in deploy/ and the runbook is one that the program understands."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
import yaml

from fedseg.cli import app
from tests.deploy.variants import (
    COMPOSE_FILES,
    DEPLOY,
    DOCKERFILES,
    PROJECT,
    UNITS,
    compose,
    dockerfile,
    manifests,
    pods,
    unit,
)

ROOT = typer.main.get_command(app)


def written() -> list[tuple[str, str]]:
    """Where a command stands, and its words after `fedseg`."""
    found = [(path.name, _words(i.rest)) for path in DOCKERFILES for i in dockerfile(path) if i.word == "CMD"]
    for path in COMPOSE_FILES:
        for name, service in compose(path)["services"].items():
            if "FEDSEG_" in str(yaml.safe_load(path.read_text())["services"][name]["image"]):
                found.append((f"{path.name} {name}", shlex.join(service["command"])))
    for folder in ("coordinator", "site"):
        for pod in pods(manifests(folder)).values():
            found += [(f"{folder} pod", shlex.join(c["args"])) for c in pod["containers"] if "args" in c]
    for path in UNITS:
        for line in unit(path.stem)["ExecStart"]:
            if "/fedseg " in line:
                found.append((path.name, line.partition("/fedseg ")[2]))
    for path in (*DEPLOY.rglob("*.md"), *(PROJECT / "docs").glob("runbook.md")):
        found += [(path.name, words) for words in _commands(path)]
    return sorted(set(found))


def _words(json_list: str) -> str:
    return shlex.join(yaml.safe_load(json_list))


def _commands(path: Path) -> list[str]:
    """From code spans and code blocks, up to a comment, a pipe or an ellipsis."""
    text = path.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    found = [re.search(r"(?:^|[\s/])fedseg ([a-z][^|#;&>…]*)", line) for line in lines]
    return [match[1].replace("...", "").strip() for match in found if match]


@pytest.mark.parametrize(("place", "words"), written())
def test_the_program_understands_a_command_that_is_written_down(place: str, words: str):
    command: click.Command = ROOT
    arguments = shlex.split(words)
    context = click.Context(ROOT, info_name="fedseg")
    while isinstance(command, click.Group):
        name, child, arguments = command.resolve_command(context, arguments)
        assert child is not None
        context = click.Context(child, info_name=name, parent=context)
        command = child
    if not arguments:  # a sentence that names the command
        return
    command.make_context(
        context.info_name, arguments, parent=context.parent
    )  # refuses unknown options and wrong numbers
