"""A site's own series: made by a real service process, scraped over HTTP from another one."""

import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedseg.site.audit import AuditLog
from fedseg.site.connect import Connection
from fedseg.site.desk import Desk
from fedseg.site.gpus import _library, gpus
from fedseg.site.scrape import scraped, socket_in
from fedseg.site.series import CATALOGUE, catalogue_table, exposition
from fedseg.site.service import opened
from fedseg.site.supernode import free_port
from fedseg.site.tally import Tally
from fedseg.site.wire.site_pb2 import Description
from tests.prometheus import panel_queries, rule_metrics
from tests.site.rounds import asked, write_hospital

ROOT = Path(__file__).parents[2]
DEPLOYED = ROOT / "deploy"
PROMTOOL = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
PREFIX = "fedseg_site_service_"


def samples(text):
    """Values by name and labels, the site's left out."""
    return {
        (sample.name, *sorted(value for name, value in sample.labels.items() if name != "site")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def seen(desk):
    """The exposition of a desk without a service around it."""
    now = Description(site="Aare", version="1", state="idle", device="cpu", started=1.0)
    return exposition(now, desk.tally, desk.config.state_folder)


def fetch(port, path="metrics", method="GET"):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", method=method)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read().decode()


@contextmanager
def running(*arguments):
    """A `fedseg site` command."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fedseg", "site", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


@contextmanager
def service(config):
    """A way to a service process that answers."""
    path = Path(config.socket)
    with running("serve", Path(config.data).parent / "site.toml"), Connection(path, patience=90) as connection:
        connection.describe()
        yield connection


Watched = namedtuple("Watched", "before trained again down names")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """What was scraped before a round, after one, after a restart of the service, and when it is gone."""
    folder, port = tmp_path_factory.mktemp("site"), free_port()
    config = write_hospital(folder)
    with running("metrics", folder / "site.toml", "--port", port) as metrics:
        assert f"http://127.0.0.1:{port}/metrics" in metrics.stderr.readline()
        with service(config) as connection:
            before = fetch(port)
            connection.ask(asked(), train=True)
            connection.ask(asked(train=False), train=False)
            connection.ask(asked(), train=False)  # another kind than the instructions: refused
            connection.ask(b"garbage", train=True)
            trained = fetch(port)
        down = fetch(port)
        with service(config):
            again = fetch(port)
    names = [path.name.split(".")[0] for path in Path(config.data).rglob("*.nii.gz")]
    return Watched(before, trained, again, down, names)


# ---------------------------------------------------------------------------------------------------- processes
def test_every_series_of_the_catalogue_is_scraped_and_no_other(watched):
    found = {name for name, *_ in samples(watched.trained)}
    expected = {series.exposed_name for series in CATALOGUE.values()}
    assert {name for name in expected - found if "_gpu_" not in name} == set()
    assert found <= expected
    for family in text_string_to_metric_families(watched.trained):
        for sample in family.samples:
            assert set(sample.labels) == set(CATALOGUE[sample.name.removesuffix("_total")].labels)


def test_series_say_what_the_site_was_asked_and_what_became_of_it(watched):
    found = samples(watched.trained)
    assert found[f"{PREFIX}up",] == found[f"{PREFIX}server_round",] == 1
    assert found[f"{PREFIX}requests_total", "allowed", "train"] == 1
    assert found[f"{PREFIX}requests_total", "allowed", "evaluate"] == 1
    assert found[f"{PREFIX}requests_total", "evaluate", "refused"] == 1
    assert found[f"{PREFIX}policy_refusals_total", "kind"] == 1
    assert found[f"{PREFIX}failures_total", "MessageError"] == 1
    assert found[f"{PREFIX}steps_total",] == found[f"{PREFIX}epochs_total",] == 1
    assert (found[f"{PREFIX}cases", "training"], found[f"{PREFIX}cases", "validation"]) == (2, 1)
    assert found[f"{PREFIX}cache_misses_total",] == 3
    assert 0 <= found[f"{PREFIX}dice_mean",] <= 1
    assert found[f"{PREFIX}training_images_per_second",] > 0
    assert found[f"{PREFIX}busy",] == 0
    assert {key[1] for key in found if key[0] == f"{PREFIX}dice"} == {"liver", "spleen", "kidneys"}


def test_before_the_first_request_counters_are_there_with_zeros(watched):
    found = samples(watched.before)
    assert found[f"{PREFIX}requests_total", "allowed", "train"] == 0
    assert found[f"{PREFIX}policy_refusals_total", "min_cases"] == 0
    assert (f"{PREFIX}training_loss",) not in found


def test_a_restart_of_the_service_changes_no_figure_of_what_was_done(watched):
    moving = ("started_", "memory_", "state_", "gpu_")
    kept = [
        {key: value for key, value in samples(text).items() if not key[0].removeprefix(PREFIX).startswith(moving)}
        for text in (watched.trained, watched.again)
    ]
    noted = (f"{PREFIX}audit_entries_total",)
    assert kept[1].pop(noted) == kept[0].pop(noted) + 2  # stopped, started
    assert kept[0] == kept[1]


def test_a_service_that_is_gone_has_one_series_that_says_so(watched):
    assert samples(watched.down) == {(f"{PREFIX}up",): 0}


def test_no_series_names_a_case_or_a_path(watched):
    assert watched.names
    for name in watched.names:
        assert name not in watched.trained
    assert "/" not in "".join(line for line in watched.trained.splitlines() if not line.startswith("#"))


@PROMTOOL
def test_promtool_finds_nothing_wrong_with_what_is_scraped(watched):
    for text in (watched.trained, watched.down):
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_series_can_be_printed_once(tmp_path):
    config = write_hospital(tmp_path)
    command = [sys.executable, "-m", "fedseg", "site", "metrics", str(tmp_path / "site.toml"), "--once"]
    with opened(config):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, samples(done.stdout)[f"{PREFIX}up",]) == (0, 1)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, samples(done.stdout)) == (1, {(f"{PREFIX}up",): 0})


def test_what_answers_scrapes_reads_no_volumes_and_has_no_torch():
    program = (
        "import sys, fedseg.cli.site, fedseg.site.scrape, fedseg.endpoint\n"
        "print([name for name in sys.modules if name in ('torch', 'monai') or name.startswith('fedseg.data')])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------------------------------------------- counting
def test_figures_that_the_policy_keeps_at_home_are_in_no_series(tmp_path):
    policy = 'min_cases = 1\nmin_validation_cases = 1\nmetrics = ["dice"]\nlabels = ["liver"]'
    desk = Desk(write_hospital(tmp_path, policy=policy))
    desk.answer(asked(), train=True, watch=lambda *_: None)
    found = samples(seen(desk))
    assert {key[1] for key in found if key[0] == f"{PREFIX}dice"} == {"liver"}
    hidden = ("training_loss", "data_wait_ratio", "training_images_per_second", "quarantined_cases")
    assert not {key[0].removeprefix(PREFIX) for key in found} & set(hidden)


def test_a_score_of_too_few_cases_is_in_no_series(tmp_path):
    desk = Desk(write_hospital(tmp_path, policy="min_cases = 1\nmin_validation_cases = 2"))
    desk.answer(asked(), train=True, watch=lambda *_: None)
    assert not [key for key in samples(seen(desk)) if "dice" in key[0] or "validation" in key]


def test_codes_that_nobody_knows_are_counted_as_other(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append(
        {
            "event": "request",
            "asked": {"kind": ["x"], "bytes": "many"},
            "decided": "failed",
            "left": {"reason": "/data/Meier"},
        }
    )
    log.append({"event": "request", "asked": 3, "decided": "refused", "rule": "Meier", "seconds": "inf", "left": None})
    tally = Tally(log.path)
    assert tally.failures == {"other": 1}
    assert tally.refusals == {"other": 1}
    assert tally.requests == {("other", "failed"): 1, ("other", "refused"): 1}
    assert (tally.entries, tally.last) == (2, {})


def test_a_log_of_an_earlier_release_is_counted(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append(
        {"event": "request", "asked": {"kind": "train", "bytes": 10, "server_round": 7, "local_epochs": 2},
         "decided": "allowed", "rule": None, "seconds": 3.5, "cases": 6,
         "training": {"loss": 0.5, "steps": 4.0, "seconds": 2.0, "data_seconds": 0.5},
         "left": {"bytes": 20, "training": ["data_seconds", "loss", "seconds", "steps"]}}
    )  # fmt: skip
    tally = Tally(log.path)
    assert tally.counts == {"received_bytes": 10, "sent_bytes": 20, "epochs": 2, "steps": 4, "hit": 0, "miss": 0}
    assert tally.last["loss"] == 0.5
    assert tally.last["wait_ratio"] == 0.25
    assert (tally.server_round, tally.last["training_cases"], tally.dice) == (7, 6, {})


def test_a_damaged_log_is_counted_as_far_as_it_can_be_read(tmp_path, caplog):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append({"event": "started"})
    with log.path.open("ab") as file:
        file.write(b"{}\n")
    assert Tally(log.path).entries == 1
    assert "counters begin with a part of the audit log only" in caplog.text


def test_entries_that_cannot_be_written_are_counted(tmp_path):
    config = write_hospital(tmp_path)
    desk = Desk(config)
    desk.note("started")
    with config.audit_log.open("ab") as log:
        log.write(b"{}\n")
    with pytest.raises(Exception, match="was changed by something else"):
        desk.answer(asked(), train=True, watch=lambda *_: None)
    found = samples(seen(desk))
    assert (found[f"{PREFIX}audit_failures_total",], found[f"{PREFIX}audit_entries_total",]) == (
        2,
        1,
    )  # that of the data, and that of the request


def test_the_socket_is_that_of_the_site_file(tmp_path):
    file = tmp_path / "site.toml"
    file.write_text('name = "Aare"\n')
    assert socket_in(file) == tmp_path / "site.sock"
    file.write_text('socket = "/run/fedseg/site.sock"\n')
    assert socket_in(file) == Path("/run/fedseg/site.sock")
    file.write_text("socket = 3\n")
    with pytest.raises(Exception, match="socket must be a path in quotes"):
        socket_in(file)


def test_where_nobody_listens_the_site_is_down(tmp_path):
    assert samples(scraped(tmp_path / "no.sock")) == {(f"{PREFIX}up",): 0}


# ---------------------------------------------------------------------------------------------------- what is shipped
def test_the_documented_catalogue_is_the_real_one():
    documented = (ROOT / "docs" / "hospital.md").read_text()
    assert catalogue_table() in documented, "make it again from fedseg.site.series.catalogue_table()"


def test_rules_and_dashboard_ask_for_series_that_exist():
    known = {series.exposed_name for series in CATALOGUE.values()}
    for rule, metrics in rule_metrics("site_rules.yml").items():
        assert metrics, rule
        assert metrics <= known, rule
    panels = list(panel_queries("site.json", site="Aare"))
    shown = {name for _, query in panels for name in re.findall(r"fedseg\w+", query)}
    assert shown <= known
    assert known - shown == {f"{PREFIX}info", f"{PREFIX}started_timestamp_seconds"}


@PROMTOOL
@pytest.mark.parametrize(
    "check", ["check config site.yml", "check rules site_rules.yml", "test rules site_rules_test.yml"]
)
def test_promtool_finds_nothing_wrong_with_configuration_and_rules(check):
    folder = DEPLOYED / "prometheus"
    done = subprocess.run(["promtool", *check.split()], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------- cards
class Nvml:
    """NVIDIA's library as its Python package presents it, with two cards."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, driver=True):
        self._driver = driver

    def nvmlInit(self):
        if not self._driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetMemoryInfo(self, card):
        return namedtuple("Memory", "total free used")(80 << 30, 60 << 30, 20 << 30)

    def nvmlDeviceGetUtilizationRates(self, card):
        if card == 1:
            raise self.NVMLError("Not Supported")
        return namedtuple("Rates", "gpu memory")(37, 5)


@pytest.fixture
def library(monkeypatch):
    _library.cache_clear()
    yield lambda module: monkeypatch.setitem(sys.modules, "pynvml", module)
    _library.cache_clear()


def test_cards_are_shown_as_far_as_they_answer(tmp_path, library):
    library(Nvml())
    found = samples(seen(Desk(write_hospital(tmp_path))))
    assert found[f"{PREFIX}gpu_memory_used_bytes", "0"] == 20 << 30
    assert found[f"{PREFIX}gpu_memory_size_bytes", "0"] == 80 << 30
    assert found[f"{PREFIX}gpu_utilisation_ratio", "0"] == 0.37
    assert (f"{PREFIX}gpu_memory_used_bytes", "1") not in found


@pytest.mark.parametrize("module", [None, Nvml(driver=False)], ids=["no library", "no driver"])
def test_without_library_or_driver_there_are_no_cards(library, module):
    library(module)
    assert gpus() == []
