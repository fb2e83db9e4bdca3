import tempfile

import pytest

from fedseg.config import load_experiment
from fedseg.site.config import load_site
from fedseg.site.finding import Known
from fedseg.site.rehearsal import rehearse
from tests.coordinator.studies import EXPERIMENT
from tests.site.ready import ReadySite

CT = (
    EXPERIMENT.replace('"mr"', '"ct"')
    .replace(
        "liver = 1 }", 'liver = 1, tumour = 2, "left kidney" = 3, "right kidney" = 4 }, channels = ["early", "late"]'
    )
    .replace("rounds = 2", 'rounds = 2, exchange = "all-but-norms"')
    .replace("[4, 8]", '[4, 8], norm = "batch"')
    + 'data = { window = [-160.0, 240.0], spacing = [2.5, 1.5, 1.5], crop = "nonzero", min_cases = 40 }\n'
    "privacy = { clip_norm = 1.0, noise_multiplier = 0.5 }\n"
)


def dry_round(tmp_path, experiment=EXPERIMENT, **site):
    ready = ReadySite(tmp_path, experiment=experiment, data=False)
    ready.write(**site)
    return rehearse(Known(ready.kit, ready.file, experiment=load_experiment(ready.kit / "experiment.toml"),
                          config=load_site(ready.file)))  # fmt: skip


@pytest.mark.parametrize("experiment", [EXPERIMENT, CT], ids=["mr", "ct with two channels and private tensors"])
def test_a_step_of_any_study_is_trained_on_made_up_volumes(tmp_path, experiment):
    found = dry_round(tmp_path, experiment)
    assert found.state == "ok", found
    assert found.found.startswith("1 training step and scores on 3 made-up cases in ")
    assert "an update of 0.0" in found.found


def test_nothing_stays_behind(tmp_path, monkeypatch):
    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    assert dry_round(tmp_path).state == "ok"
    assert list(elsewhere.iterdir()) == []
    assert not (tmp_path / "kits" / "sites" / "Aare" / "state").exists()
    assert not (tmp_path / "kits" / "sites" / "Aare" / "cache").exists()


def test_hours_and_numbers_of_cases_do_not_stop_it(tmp_path):
    found = dry_round(
        tmp_path, policy='min_cases = 1000\nmin_validation_cases = 1000\nhours = ["Mo 03:00-03:01"]\nmax_rounds = 1'
    )
    assert found.state == "ok", found


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ('tensors = ["decoder.*"]', "policy.tensors: tensor"),
        ("max_megabytes = 0.001", "policy.max_megabytes: an update of"),
        ("max_minutes = 0.0001", "policy.max_minutes"),
    ],
)
def test_what_the_policy_would_keep_back_is_found_here(tmp_path, policy, words):
    found = dry_round(tmp_path, policy=policy)
    assert found.state == "not ready"
    assert words in found.found


def test_weights_that_only_the_coordinator_has_are_not_needed(tmp_path):
    experiment = load_experiment_with_a_warm_start(tmp_path)
    ready = ReadySite(tmp_path / "study", data=False)
    assert rehearse(Known(ready.kit, ready.file, experiment=experiment, config=load_site(ready.file))).state == "ok"


def load_experiment_with_a_warm_start(folder):
    (folder / "warm.toml").write_text(EXPERIMENT.replace('"unet",', '"unet", pretrained = "weights.safetensors",'))
    return load_experiment(folder / "warm.toml")


def test_an_error_is_told_here_though_it_would_never_leave(tmp_path):
    found = dry_round(tmp_path, device="cuda:9")
    assert found.state == "not ready"
    assert "ends with ConfigError: ConfigError: device 'cuda:9' is not there" in found.found
