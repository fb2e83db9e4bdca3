import subprocess
import sys
import zipfile

from typer.testing import CliRunner

from fedseg.cli import app
from fedseg.kit import load_kit
from tests.coordinator.studies import Studies

run = CliRunner()


def provision(study, *options, columns=400):
    done = run.invoke(
        app, ["provision", str(study.file), "-o", str(study.kits), *options], env={"COLUMNS": str(columns)}
    )
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.stdout


def test_what_was_written_for_whom_is_told_with_the_fingerprint(tmp_path):
    study = Studies(tmp_path)
    study.write("Aare", "Elbe")
    told = provision(study, "--app", str(study.app))
    for part in ("coordinator.zip", "sites/Aare.zip", "sites/Elbe.zip", "authority", "keep it offline"):
        assert part in told
    assert load_kit(study.site("Aare")).fingerprint in told
    assert "nothing to do" in provision(study)


def test_standing_is_shown_and_fits_a_narrow_terminal(tmp_path):
    study = Studies(tmp_path)
    study.provision("Aare", {"name": "Elbe", "institution": "Spital [Elbe]"})
    study.provision(revoke=["Elbe"])
    shown = provision(study, "--show")
    rows = {line.split()[1]: line for line in shown.splitlines() if "made here" in line}
    assert set(rows) == {"server", "loopback", "Aare", "Elbe"}
    assert f"{study.now:%Y-%m-%d}" in rows["Elbe"]
    assert f"{study.now:%Y-%m-%d}" not in rows["Aare"]
    assert max(map(len, provision(study, "--show", columns=80).splitlines())) <= 80


def test_standing_needs_no_study_file_and_everything_else_does(tmp_path):
    study = Studies(tmp_path)
    study.provision("Aare")
    shown = run.invoke(app, ["provision", "--show", "-o", str(study.kits)])
    assert shown.exit_code == 0
    assert "Aare" in shown.stdout
    refused = run.invoke(app, ["provision", "-o", str(study.kits)])
    assert "Name the study file" in str(refused.exception)


def test_without_a_bundle_that_of_the_installation_is_packed(tmp_path):
    study = Studies(tmp_path)
    study.write("Aare")
    provision(study)
    with zipfile.ZipFile(study.site("Aare") / "app.fab") as bundle:
        assert "client/app.py" in bundle.namelist()
    assert (study.site("Aare") / "app.fab").read_bytes() == (study.coordinator / "app.fab").read_bytes()


def test_a_wrong_study_is_one_readable_message_and_exit_code_2(tmp_path):
    study = Studies(tmp_path)
    study.write("Aare", "aare")
    code = "from fedseg.cli import main; main()"
    command = [sys.executable, "-c", code, "provision", str(study.file), "-o", str(study.kits)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "study.toml: sites: 'Aare' and 'aare' are one name" in done.stderr
    assert not study.kits.exists()
