import json
import logging
import subprocess
import sys
import threading
from datetime import datetime, timedelta

import pytest
import typer

from fedseg import logs


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


def test_an_error_of_a_command_is_a_line_too(tmp_path):
    command = [sys.executable, "-m", "fedseg", "--log-format", "json", "experiment", "check", "nowhere.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
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
