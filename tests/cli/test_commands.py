import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import fedseg
from fedseg.cli import app

run = CliRunner()


def test_models_are_listed_with_their_sizes_as_json():
    rows = json.loads(run.invoke(app, ["models", "--json"]).stdout)
    sizes = {(row["name"], row["preset"]): row["parameters"] for row in rows}
    assert sizes["mlru++", "synapse"] == sizes["mlru++", "btcv"] == 46_087_124
    assert sizes["mlru++", "acdc"] == 44_260_182
    assert sizes["mlru++", "lung"] == 56_460_400
    assert sizes["mlru++", "tumor"] == 28_518_294
    assert next(row["input_size"] for row in rows if row["preset"] == "acdc") == [16, 160, 160]


def test_models_are_listed_as_a_table_that_fits():
    shown = run.invoke(app, ["models"], env={"COLUMNS": "80"}).stdout
    assert "46,087,124" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_help_answers_without_torch():
    """What makes a command line slow is heavy imports."""
    code = "import sys, fedseg.cli; print(sorted({'torch', 'monai', 'scipy', 'matplotlib', 'flwr'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    assert "simulate" in run.invoke(app, ["--help"]).stdout
    assert run.invoke(app, ["--version"]).stdout.strip() == fedseg.__version__


@pytest.mark.parametrize(("option", "key"), [([], "federation"), (["--scenario"], "baselines")])
def test_schemas_name_and_explain_every_setting(option, key):
    schema = json.loads(run.invoke(app, ["experiment", "schema", *option]).stdout)
    assert key in schema["properties"]
    assert "FedProx" in schema["$defs"]["FederationConfig"]["properties"]["proximal_mu"]["description"]


def test_a_wrong_experiment_is_one_readable_message_and_exit_code_2(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text('name = "x"\n[training]\npatch_size = [0, 16, 16]\n')
    code = "from fedseg.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "experiment", "check", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "study.toml: training.patch_size.0" in done.stderr
    assert "study.toml: task: is missing" in done.stderr
