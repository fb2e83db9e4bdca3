import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WIRE = Path("fedseg") / "site" / "wire"
GENERATED = ("site_pb2.py", "site_pb2.pyi", "site_pb2_grpc.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the compiler makes of the definition today."""
    folder = tmp_path_factory.mktemp("wire")
    outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, str(WIRE / "site.proto")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    return folder / WIRE


@pytest.mark.parametrize("name", GENERATED)
def test_the_generated_code_is_that_of_the_definition(made, name):
    assert (ROOT / WIRE / name).read_text() == (made / name).read_text()


def test_the_wire_loads_nothing_but_protobuf_and_grpc():
    program = "import sys, fedseg.site.wire.site_pb2_grpc; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert loaded & {"torch", "numpy", "monai", "pydantic"} == set()
