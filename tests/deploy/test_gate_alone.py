"""The gate's image has no torch and nothing else that only training needs: what the gate runs must not ask for it."""

import subprocess
import sys

import pytest

from tests.deploy.test_dockerfiles import TRAINING_ONLY
from tests.deploy.variants import PROJECT

FORBID = """
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"the gate's image has no {{name}}", name=name)
sys.meta_path.insert(0, Absent())
{code}
"""


@pytest.mark.parametrize(
    "code",
    [
        "import client.app",
        "import fedseg.site.supernode, fedseg.site.connect, fedseg.site.approval, fedseg.kit",
        "sys.argv = ['fedseg', '--help']\nfrom fedseg.cli import main\nmain()",
        "sys.argv = ['fedseg', 'site', 'gate', '--help']\nfrom fedseg.cli import main\nmain()",
    ],
    ids=["what Flower starts", "what the SuperNode needs", "the command", "the command's gate"],
)
def test_the_gate_runs_without_what_only_training_needs(code: str):
    program = FORBID.format(absent=TRAINING_ONLY, code=code)
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
