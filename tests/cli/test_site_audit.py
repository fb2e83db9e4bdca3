"""`fedseg site audit` as people type it."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fedseg.cli.site_audit import app
from fedseg.errors import AuditError
from fedseg.federated.messages import SiteUpdate
from fedseg.site.audit import AuditLog, what_left
from fedseg.site.chain import digest_of


def run(*arguments, code=0):
    result = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "state" / "audit.jsonl"
    left = what_left(SiteUpdate("Aare", 1, {"conv.weight": np.ones(3, np.float32)}, 12), "c" * 64, 2_500_000)
    asked = {"kind": "train", "study": "liver", "server_round": 1, "model": "unet", "experiment": "e" * 64}
    for entry in (
        {"event": "started", "version": "1.0", "policy": {"models": "all"}},
        {"event": "request", "asked": asked, "decided": "allowed", "rule": None, "cases": 12, "seconds": 61.5, "left": left},
        {
            "event": "request",
            "asked": asked | {"server_round": 2, "study": "[red]\x1b[31mx"},
            "decided": "refused",
            "rule": "max_local_epochs",
            "seconds": 0.1,
            "left": {"reason": "policy.max_local_epochs"},
        },
    ):  # fmt: skip
        AuditLog(path).append(entry)
    return path


def test_a_whole_log_is_verified_with_its_head(log):
    told = run("verify", log)
    assert "3 entries, 20" in told
    assert "nothing was changed" in told
    head = digest_of(log.read_bytes().splitlines()[-1])
    assert f"head {head}" in told
    assert "nothing was changed" in run("verify", log, "--head", head)


def test_a_changed_log_is_told_with_its_line_and_exits_with_1(log):
    log.write_bytes(log.read_bytes().replace(b'"cases":12', b'"cases":13'))
    told = run("verify", log, code=1)
    assert f"{log}:2: line 2 is not the one that was written" in told
    assert "the lines before 2 are as they were written" in told


def test_the_log_is_shown_as_a_table(log):
    told = run("show", log)
    rows = [line for line in told.splitlines() if "train" in line]
    assert len(rows) == 2
    assert all(
        text in rows[0] for text in ("train liver unet", "allowed", "12", "61.5", "2.500 MB, 1 tensors, cccccccc")
    )
    assert all(text in rows[1] for text in ("refused: max_local_epochs", "code policy.max_local_epochs"))
    assert "started" in told
    assert "\x1b" not in told
    assert "[red]" in told


def test_the_last_entries_are_shown_as_json(log):
    lines = run("show", log, "--last", 2, "--json").splitlines()
    assert lines == log.read_text().splitlines()[1:]
    assert json.loads(lines[0])["entry"]["cases"] == 12


def test_a_site_file_stands_for_its_log(log, tmp_path):
    site = tmp_path / "site.toml"
    site.write_text('name = "Aare"\ndata = "data"\nstate = "state"\n')
    assert "3 entries" in run("verify", site)
    assert "refused" in run("show", site)


def test_entries_of_other_programs_are_shown_as_far_as_they_can_be_read(log):
    odd = [
        {},
        {"event": 3, "x": None},
        {"event": "request", "asked": [], "left": {"sha256": 7, "bytes": "x", "tensors": 1}},
    ]
    for entry in odd:
        AuditLog(log).append(entry)
    assert len([line for line in run("show", log).splitlines() if "20" in line]) >= 6


def test_a_log_that_is_not_there_is_an_error(tmp_path):
    for command in ("verify", "show"):
        result = CliRunner().invoke(app, [command, str(tmp_path / "audit.jsonl")])
        assert isinstance(result.exception, AuditError)


def test_a_kit_stands_for_its_log(log, tmp_path):
    (tmp_path / "site.toml").write_text('name = "Aare"\ndata = "data"\nstate = "state"\n')
    assert "3 entries" in run("verify", tmp_path)
