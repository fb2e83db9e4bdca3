"""An installation must find the library, wherever it is started from."""

import subprocess
import sys
from pathlib import Path


def test_the_installed_command_runs_outside_the_checkout(tmp_path):
    command = Path(sys.executable).with_name("fedseg")
    done = subprocess.run(
        [str(command), "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_nothing_beside_the_library_has_its_name(tmp_path):
    program = "import fedseg; print(*fedseg.__path__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert len(done.stdout.split()) == 1
    assert (Path(done.stdout.strip()) / "cli" / "__init__.py").is_file()
