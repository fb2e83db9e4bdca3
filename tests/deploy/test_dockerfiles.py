import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.deploy.variants import DEPLOY, DOCKERFILES, PROJECT, dockerfile

TRAINING_ONLY = {"matplotlib", "monai", "nibabel", "reportlab", "scipy", "torch"}
each = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix[1:])


def test_there_is_an_image_for_each_process():
    assert [path.suffix for path in DOCKERFILES] == [".coordinator", ".gate", ".site"]


@each
def test_the_base_is_one_version_with_a_digest_that_must_be_given(path: Path):
    instructions = dockerfile(path)
    arguments = [i.rest for i in instructions if i.word == "ARG"]
    assert arguments[0] == "PYTHON_DIGEST"  # no default: without it the name ends in @ and the build stops
    assert re.fullmatch(r"BASE=docker\.io/library/python:3\.\d+\.\d+-slim-\w+@\$\{PYTHON_DIGEST\}", arguments[1])
    assert [i.rest for i in instructions if i.word == "FROM"] == ["${BASE} AS build", "${BASE} AS runtime"]
    assert "latest" not in path.read_text()


@each
def test_the_last_stage_runs_as_a_number_installs_nothing_and_stops_on_sigterm(path: Path):
    instructions = dockerfile(path)
    last = instructions[max(n for n, i in enumerate(instructions) if i.word == "FROM") :]
    words = [i.word for i in last]
    assert [i.rest for i in last if i.word == "USER"] == ["10001:10001"]
    assert words.index("USER") < words.index("ENTRYPOINT")
    assert [i.rest for i in last if i.word == "STOPSIGNAL"] == ["SIGTERM"]
    assert words.count("HEALTHCHECK") == 1
    assert "org.opencontainers.image.title" in " ".join(i.rest for i in last if i.word == "LABEL")
    runs = " ".join(i.rest for i in last if i.word == "RUN")
    assert not re.search(r"\b(pip|apt-get|curl|wget|gcc|git)\b", runs)


@each
def test_nothing_is_fetched_from_an_address(path: Path):
    instructions = dockerfile(path)
    assert "ADD" not in [i.word for i in instructions]
    assert not any("://" in i.rest for i in instructions if i.word == "RUN")


@each
def test_what_is_copied_exists_and_is_let_through(path: Path):
    allowed = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
    assert next(line for line in allowed if not line.startswith("#")) == "*"
    for instruction in dockerfile(path):
        if instruction.word == "COPY" and not instruction.rest.startswith("--from"):
            for source in instruction.rest.split()[:-1]:
                assert (PROJECT / source).exists(), source
                assert f"!{source}" in allowed, source


def test_the_gate_asks_for_what_the_library_asks_for_less_training():
    lines = (DEPLOY / "docker" / "gate-requirements.txt").read_text().splitlines()
    gate = {str(Requirement(line)) for line in lines if not line.startswith("#")}
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    library = set(map(Requirement, project["dependencies"]))
    assert gate == {str(r) for r in library if r.name not in TRAINING_ONLY}
    assert {r.name for r in library} >= TRAINING_ONLY


@pytest.mark.parametrize("path", [p for p in DOCKERFILES if p.suffix != ".gate"], ids=lambda path: path.suffix[1:])
def test_torch_comes_first_in_the_pinned_version_from_a_named_index(path: Path):
    instructions = dockerfile(path)
    (torch,) = [n for n, i in enumerate(instructions) if i.word == "RUN" and "^torch==" in i.rest]
    assert '--index-url "${TORCH_INDEX}"' in instructions[torch].rest
    installs = [n for n, i in enumerate(instructions) if i.word == "RUN" and "install" in i.rest and "pip" in i.rest]
    assert installs[0] == torch
    assert any(line.startswith("torch==") for line in (PROJECT / "constraints.txt").read_text().splitlines())
