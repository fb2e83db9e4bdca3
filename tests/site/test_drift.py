"""What a hospital learns of its own images, what of it may leave, and who is told."""

import json

import pytest
from typer.testing import CliRunner

from fedseg.cli import app
from fedseg.data.phantom import PhantomConfig, ScannerConfig, write_phantoms
from fedseg.federated.messages import RoundInstructions
from fedseg.federated.networks import start_state
from fedseg.federated.rounds import fingerprint_instructions
from fedseg.federated.site import Site
from fedseg.model_file import save_model_file
from fedseg.site.audit import last_drift
from fedseg.site.desk import Desk
from tests.site.rounds import EXPERIMENT, decoded, logged, write_hospital

LOOKING = EXPERIMENT.model_copy(
    update={"data": EXPERIMENT.data.model_copy(update={"fingerprint": True}), "name": "looking"}
)
ASK = fingerprint_instructions(LOOKING.to_json()).encode()
run = CliRunner()


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """The fingerprint of a hospital with many cases from a clean scanner."""
    folder = tmp_path_factory.mktemp("federation")
    write_phantoms(folder / "data", PhantomConfig(cases=12, shape=(16, 20, 20), first=100))
    config = write_hospital(folder / "site")
    return Site(config.model_copy(update={"data": str(folder / "data")})).fingerprint(LOOKING)


def train(fingerprint):
    return RoundInstructions(
        1, start_state(LOOKING).weights, LOOKING.to_json(), evaluate=False, fingerprint=fingerprint
    ).encode()


def answer(desk, document, *, train):
    return decoded(desk.answer(document, train=train, watch=lambda *_: None))


def test_a_site_tells_sums_over_its_training_cases_and_nothing_else(tmp_path):
    config = write_hospital(tmp_path)
    update = answer(Desk(config), ASK, train=False)
    assert update.fingerprint == Site(config).fingerprint(LOOKING)
    assert update.fingerprint.cases == update.num_cases == 2
    assert (update.delta, update.sums, update.training) == ({}, {}, {})
    assert logged(config)[0]["left"]["fingerprint"] == {"cases": 2, "features": len(update.fingerprint.sums)}


def test_a_policy_keeps_the_fingerprint_at_home(tmp_path):
    config = write_hospital(tmp_path, policy='min_cases = 1\nmetrics = ["dice"]')
    desk = Desk(config)
    assert not answer(desk, ASK, train=False).fingerprint
    assert logged(config)[0]["left"]["fingerprint"] is None


def test_too_few_cases_have_no_fingerprint(tmp_path):
    config = write_hospital(tmp_path, policy="min_cases = 3")
    assert Desk(config).answer(ASK, train=False, watch=lambda *_: None).reason == "policy.min_cases"


@pytest.mark.parametrize(("policy", "counted"), [("", True), ('metrics = ["dice"]', False)])
def test_a_site_with_other_images_is_warned_at_home_and_the_coordinator_is_not_told(
    tmp_path, federation, policy, counted, caplog
):
    config = write_hospital(tmp_path, policy=f"min_cases = 1\n{policy}")
    write_phantoms(tmp_path / "data", PhantomConfig(cases=8, shape=(16, 20, 20), scanner=ScannerConfig(noise=0.3)))
    desk = Desk(config)
    told = answer(desk, train(federation), train=True)
    found = last_drift(config.audit_log)
    assert found["alarm"]
    assert "noisier" in found["words"]
    assert "the images are unlike those of the others" in caplog.text
    assert "noisier" not in json.dumps(told.header())
    assert not told.fingerprint
    # whoever relays the coordinator's program can ask the same socket, so it says no more than the policy allows
    assert desk.tally.last.get("drift_alarm") == (1.0 if counted else None)


def test_a_site_like_the_others_is_not_warned(tmp_path, federation):
    config = write_hospital(tmp_path)
    write_phantoms(tmp_path / "data", PhantomConfig(cases=8, shape=(16, 20, 20), first=30))
    answer(Desk(config), train(federation), train=True)
    assert not last_drift(config.audit_log)["alarm"]


def test_site_drift_and_predict_say_what_is_unusual(tmp_path, federation):
    write_hospital(tmp_path)
    noisy = PhantomConfig(cases=6, shape=(16, 20, 20), first=40, scanner=ScannerConfig(noise=0.3))
    write_phantoms(tmp_path / "data", noisy)
    model = tmp_path / "model.safetensors"
    save_model_file(model, LOOKING, start_state(LOOKING).weights, "x", fingerprint=federation)
    done = run.invoke(app, ["site", "drift", str(model), "--site", str(tmp_path / "site.toml")])
    assert done.exit_code == 1, done.output
    assert "noisier" in done.output
    image = next((tmp_path / "data" / "imagesTr").glob("*.nii.gz"))
    done = run.invoke(app, ["predict", str(model), str(image), str(tmp_path / "label.nii.gz"), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "unlike the images that the network was trained on" in " ".join(done.stderr.split())
    assert "noisier" in " ".join(done.stderr.split())
    save_model_file(model, EXPERIMENT, start_state(EXPERIMENT).weights, "x")
    done = run.invoke(app, ["predict", str(model), str(image), str(tmp_path / "label.nii.gz"), "--device", "cpu"])
    assert "unlike" not in done.stderr
