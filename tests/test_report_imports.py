"""A report of numbers that are there does without the libraries that train."""

import subprocess
import sys


def test_writing_a_report_imports_no_torch():
    code = "import sys, fedseg.report.write, fedseg.report.pdf; print(sorted({'torch', 'monai', 'flwr'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
