"""`fedseg site check` as people type it."""

import json

from typer.testing import CliRunner

from fedseg.cli.site import app
from tests.site.ready import ReadySite


def run(*arguments, code=0):
    result = CliRunner(env={"COLUMNS": "120", "TERM": "dumb"}).invoke(app, ["check", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout


def test_a_site_that_is_ready_sees_one_row_per_check_and_exit_code_0(tmp_path):
    site = ReadySite(tmp_path)
    told = run(site.kit, "--no-network")
    rows = [line.split()[0] for line in told.splitlines() if line[:1].strip()]
    assert rows[:4] == ["what", "kit", "certificate", "experiment"]
    assert "SHA256:" in told
    assert "1 training step" in told
    assert "This site is ready." in told


def test_what_is_not_ready_is_told_with_its_remedy_and_exit_code_1(tmp_path):
    site = ReadySite(tmp_path, data=False)
    told = run(site.kit, "--no-network", "--no-training", code=1)
    assert "not ready" in told
    assert "no such folder" in " ".join(told.split())
    assert "This site is not ready." in told


def test_the_whole_is_json_for_programs(tmp_path):
    site = ReadySite(tmp_path)
    told = json.loads(run(site.kit, "--no-network", "--no-training", "--json"))
    assert told["ready"] is True
    assert told["findings"][0]["name"] == "kit"
    assert set(told["findings"][0]) == {"name", "state", "found", "remedy"}


def test_another_site_file_can_be_named(tmp_path):
    site = ReadySite(tmp_path)
    other = tmp_path / "other.toml"
    site.file.rename(other)
    run(site.kit, "--site", other, "--no-network", "--no-training")
    told = run(site.kit, "--no-network", "--no-training", code=1)
    assert "no such file" in " ".join(told.split())


def test_the_way_to_the_coordinator_is_looked_at_unless_told_otherwise(tmp_path):
    site = ReadySite(tmp_path, data=False)
    told = json.loads(run(site.kit, "--no-training", "--json", code=1))
    found = {finding["name"]: finding for finding in told["findings"]}
    assert "refused the connection" in found["connection"]["found"]
