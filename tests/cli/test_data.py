"""`fedseg data` as people type it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as png
from typer.testing import CliRunner

from fedseg.cli import app
from fedseg.cli.data import app as data_app
from fedseg.data.reasons import Reason
from fedseg.errors import ConfigError, DataError
from tests.data.niftis import ball, decathlon, noise, save

PHANTOM = ["data", "phantom", "--shape", "16", "20", "20", "--spacing", "15", "15", "15"]

EXPERIMENT = """
name = "study"
[task]
name = "balls"
modality = "mr"
labels = { background = 0, ball = 1 }
[training]
patch_size = [16, 16, 16]
[federation]
rounds = 1
"""


def run(*arguments, code=0):
    result = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"}).invoke(app, [str(argument) for argument in arguments])
    if code is not None:
        assert result.exit_code == code, result.output
    return result


def fedseg(*arguments):
    """The real program, in a process of its own."""
    code = "import sys; from fedseg.cli import main; sys.argv[0] = 'fedseg'; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "80", "TERM": "dumb"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_phantoms_are_made_checked_and_drawn(tmp_path):
    folder = tmp_path / "phantoms"
    made = run(*PHANTOM, folder, "--cases", 3, "--preview", tmp_path / "sheet.png")
    assert "3 cases, labels {'background': 0, 'liver': 1, 'spleen': 2, 'kidneys': 3}" in made.stdout.replace("\n", "")
    checked = run("data", "check", folder)
    assert "3 readable cases of 3 persons" in checked.stdout
    assert "3 of 3 cases are usable, no warnings" in checked.stdout
    run("data", "view", folder, tmp_path / "one.png", "--cases", 1)
    sheet, one = png.imread(tmp_path / "sheet.png"), png.imread(tmp_path / "one.png")
    assert sheet.shape[0] > 2 * one.shape[0]
    assert np.ptp(sheet[..., :3], axis=-1).max() > 0.3  # contours are in colour


def test_options_of_phantoms_arrive(tmp_path):
    (tmp_path / "scanner.toml").write_text('modality = "ct"\nnoise = 0\nseed = 3\n', encoding="utf-8")
    run(*PHANTOM, tmp_path / "a", "--cases", 1, "--first", 7, "--seed", 2, "--scanner", tmp_path / "scanner.toml")
    about = json.loads((tmp_path / "a/dataset.json").read_text())
    assert about["training"] == [{"image": "./imagesTr/phantom_007.nii.gz", "label": "./labelsTr/phantom_007.nii.gz"}]
    assert about["modality"] == {"0": "CT"}
    kept = about["phantom"]
    assert (kept["seed"], kept["first"], kept["shape"], kept["spacing"]) == (2, 7, [16, 20, 20], [15, 15, 15])
    assert (kept["scanner"]["noise"], kept["scanner"]["seed"]) == (0, 3)


def test_a_wrong_scanner_file_is_named(tmp_path):
    (tmp_path / "scanner.toml").write_text("noize = 1\n", encoding="utf-8")
    result = run(*PHANTOM, tmp_path / "a", "--scanner", tmp_path / "scanner.toml", code=None)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == f"{tmp_path / 'scanner.toml'}: noize: unknown key; did you mean 'noise', got 1"
    assert not (tmp_path / "a").exists()


def test_defects_are_listed_and_the_exit_code_is_one(tmp_path):
    decathlon(tmp_path / "data", ["case_1", "case_2", "case_3", "case_4"])
    (tmp_path / "data/imagesTr/case_2.nii.gz").write_bytes(b"no volume")
    save(tmp_path / "data/labelsTr/case_3.nii.gz", ball(value=9))
    save(tmp_path / "data/imagesTr/case_4.nii.gz", noise(0))
    result = run("data", "check", tmp_path / "data", code=1)
    words = result.stdout.replace("│", " ").split()
    for word in ("case_2", "error", "unreadable", "case_3", "unknown-label", "case_4", "warning", "duplicate-person"):
        assert word in words
    assert "2 of 4 cases are usable, 1 warning\n" in result.stdout
    assert str(tmp_path) not in result.stdout


def test_warnings_alone_are_no_failure(tmp_path):
    decathlon(tmp_path, ["a", "b"])
    save(tmp_path / "imagesTr/b.nii.gz", noise(0))
    assert "duplicate-person" in run("data", "check", tmp_path, code=0).stdout


def test_tables_fit_into_eighty_columns(tmp_path):
    long = "a_very_long_name_of_a_case_as_an_archive_exports_it_1.2.840.113619.2.55.3.604688119"
    decathlon(tmp_path, [long, "b"])
    save(tmp_path / f"labelsTr/{long}.nii.gz", ball() * 0)
    output = run("data", "check", tmp_path, code=1).stdout
    assert max(len(line) for line in output.splitlines()) <= 80
    together = "".join(line.split("│")[1].strip() for line in output.splitlines() if line.count("│") == 5)
    assert long in together


def test_the_audit_is_json_on_request(tmp_path):
    decathlon(tmp_path / "data", ["a", "b"])
    save(tmp_path / "data/labelsTr/b.nii.gz", ball() * 0)
    run("data", "check", tmp_path / "data", "--json", tmp_path / "audit.json", code=1)
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert [(finding["case"], finding["reason"]) for finding in audit["findings"]] == [("b", Reason.EMPTY_LABEL)]
    assert audit["fingerprint"]["shape"][0] == {"minimum": 8, "median": 8, "maximum": 8}
    piped = fedseg("data", "check", tmp_path / "data", "--json", "-")
    assert json.loads(piped.stdout) == audit
    assert "1 of 2 cases are usable" in piped.stderr
    assert piped.returncode == 1


def test_an_experiment_decides_what_is_right(tmp_path):
    decathlon(tmp_path / "data", ["a", "b"])
    save(tmp_path / "data/labelsTr/b.nii.gz", ball(value=2))
    about = json.loads((tmp_path / "data/dataset.json").read_text())
    about["labels"]["2"] = "cube"
    (tmp_path / "data/dataset.json").write_text(json.dumps(about))
    (tmp_path / "study.toml").write_text(EXPERIMENT, encoding="utf-8")
    assert "absent-structure" in run("data", "check", tmp_path / "data").stdout
    output = run("data", "check", tmp_path / "data", "--experiment", tmp_path / "study.toml", code=1).stdout
    assert "unknown-label" in output


def test_persons_are_counted_by_the_rule(tmp_path):
    decathlon(tmp_path, ["a_1", "a_2", "a_3"])
    assert "3 readable cases of 2 persons" in run("data", "check", tmp_path, "--person", "pairs").stdout
    result = run("data", "check", tmp_path, "--person", "twins", code=None)
    assert isinstance(result.exception, ConfigError)


@pytest.mark.parametrize("command", [["check"], ["view", "out.png"]])
def test_a_folder_that_is_no_cohort_is_named(tmp_path, command):
    result = run("data", command[0], tmp_path, *command[1:], code=None)
    assert isinstance(result.exception, DataError)
    assert str(tmp_path) in str(result.exception)


def test_the_program_ends_with_one_line_and_code_two(tmp_path):
    done = fedseg("data", "check", tmp_path / "[nowhere]")
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {tmp_path / '[nowhere]'}: no such folder"
    assert "Traceback" not in done.stderr


def test_a_broken_case_is_drawn_as_its_reason(tmp_path):
    decathlon(tmp_path / "data", ["a", "b"])
    (tmp_path / "data/imagesTr/a.nii.gz").unlink()
    (tmp_path / "data/labelsTr/b.nii.gz").unlink()
    run("data", "view", tmp_path / "data", tmp_path / "new/sheet.png")
    assert png.imread(tmp_path / "new/sheet.png").shape[1] > 500
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]


def test_every_command_and_option_explains_itself():
    commands = CliRunner(env={"COLUMNS": "80"}).invoke(data_app, ["--help"]).output
    for command in ("check", "phantom", "view"):
        assert command in commands
        page = run("data", command, "--help").output
        assert max(len(line) for line in page.splitlines()) <= 80
    assert "column:FILE" in run("data", "check", "--help").output


def test_the_picture_in_the_guide_is_there():
    docs = Path(__file__).parents[2] / "docs"
    assert "images/phantoms.png" in (docs / "data.md").read_text(encoding="utf-8")
    assert 20_000 < (docs / "images" / "phantoms.png").stat().st_size < 400_000


def test_the_guide_explains_every_code():
    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    from fedseg.data.audit import WARNINGS

    for code in (*Reason, *WARNINGS):
        assert f"`{code}`" in guide
