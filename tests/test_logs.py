import json
import logging
import os
import subprocess
import sys
import threading
from datetime import datetime, timedelta

import pytest
import typer

from fedseg import logs

SCENARIO = """
baselines = []
[experiment]
name = "tiny"
task = { name = "phantom", modality = "mr", labels = { background = 0, liver = 1, spleen = 2, kidneys = 3 } }
data = { validation_fraction = 0.34 }
model = { name = "unet", options = { widths = [4, 8] } }
training = { patch_size = [16, 16, 16], steps_per_epoch = 1 }
federation = { rounds = 2 }
"""
SITE = '[[sites]]\nname = "%s"\nphantom = { cases = 3, shape = [16, 20, 20], first = %d }\n'


@pytest.fixture
def written(monkeypatch):
    """A logger whose lines are JSON, and those lines."""
    lines = []
    handler = logging.Handler()
    handler.setFormatter(logs.JsonFormatter())
    handler.emit = lambda record: lines.append(handler.format(record))
    logger = logging.Logger("fedseg.test")
    logger.addHandler(handler)
    monkeypatch.setattr(logs, "_process", {})
    return logger, lambda: [json.loads(line) for line in lines if "\n" not in line]


def test_a_record_is_one_object_whatever_is_in_it(written):
    logger, lines = written
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("file %s", "a\udcff\n.nii")
    (line,) = lines()
    assert line["message"] == "file a\udcff\n.nii"
    assert (line["level"], line["logger"]) == ("ERROR", "fedseg.test")
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: two\nlines")
    assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta(0)


def test_the_nearest_word_on_what_a_line_is_about_counts(written):
    logger, lines = written
    logger.info("nothing is known")
    logs.always_about(site="Aare")
    with logs.about(run="federated", round=1):
        logger.info("both")
        logs.now_about(round=2)
        logger.info("later", extra={"site": "Elbe"})
    logger.info("after")
    known = [(line["run"], line["round"], line["site"]) for line in lines()]
    assert known == [(None, None, None), ("federated", 1, "Aare"), ("federated", 2, "Elbe"), (None, None, "Aare")]


def test_a_thread_knows_only_what_was_said_in_it(written):
    logger, lines = written
    with logs.about(round=1):
        thread = threading.Thread(target=logger.info, args=("hello",))
        thread.start()
        thread.join(10)
    assert [line["round"] for line in lines()] == [None]


def test_what_a_library_prints_is_logged(monkeypatch, caplog, capsys):
    monkeypatch.setenv(logs.FORMAT, "json")
    with logs.printed(), caplog.at_level("INFO", "fedseg"):
        print("one\ntwo\n")
        typer.secho("three", fg="green", bold=True)
    assert [record.message for record in caplog.records] == ["one", "two", "three"]
    monkeypatch.setenv(logs.FORMAT, "text")
    with logs.printed():
        print("four")
    assert capsys.readouterr().out == "four\n"


def fedseg(folder, *words, environment=None):
    return subprocess.run(
        [sys.executable, "-m", "fedseg", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_simulation_on_workers_logs_json_and_nothing_else(tmp_path):
    (tmp_path / "tiny.toml").write_text(SCENARIO + SITE % ("Aare", 0) + SITE % ("Elbe", 10))
    done = fedseg(
        tmp_path, "simulate", "tiny.toml", "-o", "out", "--workers", "2", environment={logs.FORMAT: "json"}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    answers = {(line["run"], line["round"], line["site"]) for line in lines if "accepted" in line["message"]}
    assert answers == {("federated", number, site) for number in (1, 2) for site in ("Aare", "Elbe")}
    assert "{" not in done.stdout


def test_an_error_of_a_command_is_a_line_too(tmp_path):
    done = fedseg(tmp_path, "--log-format", "json", "simulate", "nowhere.toml")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["message"] == "nowhere.toml: no such file"


def test_what_nobody_expected_is_a_line_too(tmp_path):
    program = "from fedseg import logs; logs.set_up('json'); import warnings; warnings.warn('old'); raise KeyError('x')"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    warning, error = map(json.loads, done.stderr.splitlines())
    assert "old" in warning["message"]
    assert error["level"] == "CRITICAL"
    assert error["exception"].endswith("KeyError: 'x'")
