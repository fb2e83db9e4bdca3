"""A study of several seeds, from one command to its tables."""

import shutil

import pytest

from fedseg.errors import StoreError
from fedseg.report.tables import load_result, with_seeds
from tests.test_simulation import SCENARIO, fedseg

ONE_METHOD = SCENARIO.replace('baselines = ["pooled", "local"]', "baselines = []").replace(
    "[methods.federated]\n[methods.prox]\nproximal_mu = 0.1\n", ""
)


def test_one_command_simulates_several_seeds_and_shows_them_together(tmp_path):
    (tmp_path / "tiny.toml").write_text(ONE_METHOD.replace("rounds = 3", "rounds = 1"))
    study = tmp_path / "study"
    command = ["simulate", tmp_path / "tiny.toml", "--output", study, "--workers", "1", "--no-report"]
    done = fedseg(*command, "--seed", "1", "--seed", "0")
    assert "tiny, seeds 0, 1" in fedseg("results", study).stdout
    assert "tiny, seeds 1, 0" in done.stdout
    results = [load_result(study / f"seed-{seed}") for seed in (0, 1)]
    assert [result["seed"] for result in results] == [0, 1]
    assert results[0]["final"] != results[1]["final"]
    assert (study / "study.png").exists()
    shutil.rmtree(study / "seed-0")
    refused = fedseg(*command, "--seed", "0", "--seed", "1", expect=2)
    assert "seed-1 holds results already" in refused.stdout
    assert not (study / "seed-0").exists(), "nothing is begun before all folders are free"
    fedseg(*command, "--seed", "0", "--seed", "1", "--resume")
    assert load_result(study / "seed-0")["final"] == results[0]["final"]
    with pytest.raises(StoreError, match=r"name one of .*seed-0, .*seed-1"):
        load_result(study)
    twice = fedseg(*command, "--seed", "0", "--seed", "0", expect=2)
    assert "--seed 0 is given twice" in twice.stdout
    alone = fedseg(*command[:3], study / "seed-0", "--seed", "0", "--seed", "1", "--overwrite", expect=2)
    assert "holds the results of one seed" in alone.stdout


def test_other_folders_beside_the_seeds_are_left_alone(tmp_path):
    for name in ("seed-10", "seed-2", "seed-2-old", "seed-", "pictures"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in with_seeds(tmp_path)] == ["seed-2", "seed-10"]
    assert with_seeds(tmp_path / "pictures") == [tmp_path / "pictures"]
