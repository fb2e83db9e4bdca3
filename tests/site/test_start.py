import contextlib
import threading
import time
import urllib.request

import pytest

from fedseg.errors import ConfigError, KitError
from fedseg.kit import load_kit
from fedseg.site.start import Household, Scraped
from fedseg.site.supernode import free_port
from tests.site.ready import ReadySite


def test_a_second_start_of_the_same_site_is_refused(tmp_path):
    ready, refusals = ReadySite(tmp_path, data=False), []

    def start_again(_text):
        first.stop.set()
        if not refusals:
            with pytest.raises(ConfigError) as refusal:
                Household(load_kit(ready.kit), ready.file).run()
            refusals.append(str(refusal.value))

    first = Household(load_kit(ready.kit), ready.file, tell=start_again)
    first.run()
    assert refusals == [f"{ready.kit / 'state'}: another `fedseg site start` is running there"]


def test_a_data_folder_that_is_not_there_is_told_at_once(tmp_path):
    ready, told = ReadySite(tmp_path, data=False), []
    household = Household(load_kit(ready.kit), ready.file, tell=told.append)
    household.stop.set()
    household.run()
    assert told[0].startswith(f"{ready.data}: no such folder")
    assert told[1].startswith("ending gate and site service; the running step of training is waited for")


def test_what_answers_prometheus_is_started_and_ended_with_the_site(tmp_path):
    ready, port, answers = ReadySite(tmp_path, data=False, port=free_port()), free_port(), []

    household = Household(load_kit(ready.kit), ready.file, tell=lambda _: None, scraped=Scraped(port))
    thread = threading.Thread(target=household.run)
    thread.start()
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                    answers.append(answer.read().decode())
                if "\nfedseg_site_service_up 1\n" in answers[-1]:
                    break
            time.sleep(0.1)
    finally:
        household.stop.set()
        thread.join(90)
    assert "fedseg_site_service_info{" in answers[-1]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)


def test_the_coordinators_kit_starts_no_site(tmp_path):
    ready = ReadySite(tmp_path, data=False)
    with pytest.raises(KitError, match="is the coordinator's kit; use the one that was made for this hospital"):
        Household(load_kit(ready.study.coordinator), ready.file).run()
