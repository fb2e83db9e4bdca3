import logging
import shutil
import time

import nibabel as nib
import numpy as np
import pytest

from fedseg.data.phantom import PhantomConfig, write_phantoms
from fedseg.errors import AuditError, RoundCancelled
from fedseg.federated.messages import SiteFailure
from fedseg.site.audit import verify
from fedseg.site.desk import Desk
from fedseg.site.manifest import load, load_signature, verify_signature
from tests.apps.hospitals import tiny_experiment
from tests.coordinator.studies import Studies
from tests.site.rounds import EXPERIMENT, asked, decoded, directly, instructions, logged, same, write_hospital


@pytest.fixture
def config(tmp_path):
    return write_hospital(tmp_path)


def answer(desk, document=None, *, train=True, watch=lambda *_: None):
    return desk.answer(asked() if document is None else document, train=train, watch=watch)


def test_an_answer_has_the_bits_of_the_site_called_directly(config, tmp_path):
    assert same(decoded(answer(Desk(config))), directly(config, tmp_path, instructions()))


def test_a_round_that_is_asked_twice_gives_the_same_bits(config):
    desk = Desk(config)
    first, second = decoded(answer(desk)), decoded(answer(desk))
    assert same(first, second)
    assert same(first, decoded(answer(Desk(config))))


def test_scoring_sends_sums_and_no_weights(config):
    update = decoded(answer(Desk(config), asked(train=False), train=False))
    assert update.delta == {}
    assert update.training == {}
    assert update.sums["cases"] == 1
    assert logged(config)[0]["asked"]["kind"] == "evaluate"


def test_every_answer_is_on_record_with_what_left(config):
    buffers = answer(Desk(config))
    update = decoded(buffers)
    (entry,) = logged(config)
    assert entry["decided"] == "allowed"
    assert entry["asked"] | {"bytes": 0, "sha256": ""} == {
        "kind": "train", "bytes": 0, "sha256": "", "study": "tiny", "experiment": EXPERIMENT.digest(), "server_round": 1,
        "model": "unet", "local_epochs": 1, "surface": False,
    }  # fmt: skip
    assert entry["left"]["bytes"] == len(b"".join(buffers))
    assert entry["left"]["tensors"]["count"] == len(update.delta)
    assert entry["cases"] == update.num_cases == 2
    assert entry["manifest"] == update.manifest == load(config.manifest).digest()
    assert verify(config.audit_log).problem is None


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        ('models = ["mlru++"]', "models"),
        ("min_cases = 3", "min_cases"),
        ("max_clip_norm = 1.0", "max_clip_norm"),
        ('tensors = ["nothing.*"]', "tensors"),
        ("max_megabytes = 0.001", "max_megabytes"),
        ("max_minutes = 0.0000001", "max_minutes"),
    ],
)
def test_what_the_policy_forbids_leaves_as_the_name_of_the_rule_and_is_on_record(tmp_path, policy, rule):
    config = write_hospital(tmp_path, policy=policy if "min_cases" in policy else f"min_cases = 1\n{policy}")
    assert answer(Desk(config)) == SiteFailure("Aare", 1, "abstained", f"policy.{rule}")
    (entry,) = logged(config)
    assert (entry["decided"], entry["rule"], entry["left"]) == ("refused", rule, {"reason": f"policy.{rule}"})


def test_rounds_are_counted_over_restarts(tmp_path):
    config = write_hospital(tmp_path, policy="min_cases = 1\nmax_rounds = 2")
    assert not isinstance(answer(Desk(config)), SiteFailure)
    desk = Desk(config)
    assert not isinstance(answer(desk, asked(train=False), train=False), SiteFailure)
    assert answer(desk).reason == "policy.max_rounds"
    other = tiny_experiment(rounds=3)
    assert not isinstance(answer(desk, asked(other)), SiteFailure)


def test_sums_over_too_few_cases_stay(tmp_path):
    update = decoded(answer(Desk(write_hospital(tmp_path, policy="min_cases = 1"))))
    assert update.sums == {}
    assert update.delta


def test_a_call_for_scores_does_not_train(config):
    assert answer(Desk(config), train=False).reason == "policy.kind"
    assert answer(Desk(config), asked(train=False), train=True).reason == "policy.kind"
    assert [entry["decided"] for entry in logged(config)] == ["refused", "refused"]


def test_a_site_with_too_few_cases_for_the_study_abstains(config):
    few = EXPERIMENT.model_copy(update={"data": EXPERIMENT.data.model_copy(update={"min_cases": 3})})
    assert answer(Desk(config), asked(few)) == SiteFailure("Aare", 1, "abstained", "too-few-cases")
    assert logged(config)[0]["decided"] == "abstained"


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"", "MessageError"),
        (b"garbage" * 100, "MessageError"),
        (asked()[:-5], "MessageError"),
        (asked(experiment=EXPERIMENT).replace(b"unet", b"none"), "ConfigError"),
    ],
)
def test_what_cannot_be_read_is_refused_and_on_record(config, document, reason):
    assert answer(Desk(config), document).reason == reason
    (entry,) = logged(config)
    assert (entry["decided"], entry["asked"]["bytes"], entry["left"]) == ("failed", len(document), {"reason": reason})


def test_the_text_of_an_error_stays_in_the_log_of_the_hospital(config, caplog):
    shutil.rmtree(config.data)
    with caplog.at_level(logging.ERROR):
        assert answer(Desk(config)) == SiteFailure("Aare", 1, "failed", "DataError")
    assert config.data in caplog.text
    assert config.data not in config.audit_log.read_text()


def test_nothing_leaves_when_the_log_was_changed(config):
    desk = Desk(config)
    answer(desk)
    lines = config.audit_log.read_bytes().splitlines(keepends=True)
    config.audit_log.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(AuditError, match="was changed by something else"):
        answer(desk)
    with pytest.raises(AuditError):
        answer(Desk(config))


def test_nothing_leaves_when_the_log_cannot_be_written(config):
    config.audit_log.mkdir(parents=True)
    with pytest.raises(AuditError, match="nothing may leave the site that is not on record"):
        answer(Desk(config))


def test_data_that_change_are_read_anew_and_on_record(config, tmp_path):
    desk = Desk(config)
    before = decoded(answer(desk))
    write_phantoms(tmp_path / "data", PhantomConfig(cases=3, shape=(16, 20, 20), seed=7))
    after = decoded(answer(desk))
    assert after.manifest != before.manifest
    assert not same(after, before)
    assert same(after, directly(config, tmp_path, instructions()))
    first, second = logged(config, "data")
    assert first["before"] is None
    assert (second["before"], second["manifest"]) == (before.manifest, after.manifest)


def test_one_more_case_is_used_in_the_next_round(config, tmp_path):
    desk = Desk(config)
    assert decoded(answer(desk)).num_cases == 2
    write_phantoms(tmp_path / "data", PhantomConfig(cases=4, shape=(16, 20, 20)))
    assert decoded(answer(desk)).num_cases == 3


def test_data_that_stay_are_not_on_record_again(config):
    for _ in range(2):
        answer(Desk(config))
    assert len(logged(config, "data")) == 1


def test_data_that_changed_while_the_service_was_down_are_on_record(config, tmp_path):
    before = decoded(answer(Desk(config)))
    path = sorted((tmp_path / "data" / "imagesTr").iterdir())[0]
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1].copy(), image.affine, image.header), path)
    after = decoded(answer(Desk(config)))
    assert [entry["before"] for entry in logged(config, "data")] == [None, before.manifest]
    assert after.manifest != before.manifest


def test_the_manifest_is_signed_with_the_key_of_the_site(tmp_path):
    studies = Studies(tmp_path)
    studies.provision("Aare")
    config = write_hospital(tmp_path / "hospital", key=str(studies.site("Aare") / "site.key"))
    answer(Desk(config))
    verify_signature(load(config.manifest).public(), load_signature(config.manifest), studies.site("Aare") / "site.crt")
    assert logged(config, "data")[0]["signed"] is True


def test_whoever_watches_can_end_a_round(config):
    seen = []

    def watch(phase, done, total):
        seen.append((phase, done, total))
        if phase == "training":
            raise RoundCancelled("enough")

    desk = Desk(config)
    assert answer(desk, watch=watch) == SiteFailure("Aare", 1, "failed", "RoundCancelled")
    each = [(phase, done, 3) for phase in ("checking", "preparing") for done in range(3)]
    assert seen == [*each, ("scoring", 1, 1), ("training", 0, 1)]
    assert logged(config)[0]["decided"] == "cancelled"
    assert decoded(answer(desk)).delta


@pytest.mark.parametrize("phase", ["checking", "preparing", "scoring"])
def test_a_round_can_be_ended_in_every_phase_and_the_next_one_has_the_usual_bits(config, tmp_path, phase):
    def watch(now, done, total):
        if now == phase and done:
            raise RoundCancelled("enough")

    desk = Desk(config)
    assert answer(desk, watch=watch).reason == "RoundCancelled"
    assert same(decoded(answer(desk)), directly(config, tmp_path, instructions()))


def test_a_round_that_takes_too_long_is_ended_by_the_policy(tmp_path):
    config = write_hospital(tmp_path, policy="min_cases = 1\nmax_minutes = 0.005")

    def watch(phase, done, total):
        if phase == "scoring":
            time.sleep(0.4)

    assert answer(Desk(config), watch=watch).reason == "policy.max_minutes"


def test_the_folder_with_the_log_is_closed_to_others(config):
    answer(Desk(config))
    assert config.state_folder.stat().st_mode & 0o777 == 0o700
    assert config.audit_log.stat().st_mode & 0o777 == 0o600
