"""What asks for all the memory, all the time or all the disk is refused, in a process whose memory is limited."""

import json
import subprocess
import sys
from io import BytesIO
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZIP_LZMA, ZipFile

import numpy as np
import pytest
from typer.testing import CliRunner

from fedseg.app_bundle import bundled_files
from fedseg.cli import app
from fedseg.errors import FedsegError, KitError, MessageError
from fedseg.federated.document import pack
from fedseg.federated.messages import FORMAT, SiteUpdate

LIMITED = """
import json, resource, sys
import numpy as np
from fedseg.errors import FedsegError
from fedseg.federated.messages import RoundInstructions
from fedseg.federated.site import Site
from fedseg.site.config import SiteConfig

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 1_000_000_000,) * 2)
site = Site(SiteConfig(name="Aare", data="/nowhere", cache="/nowhere/cache", device="cpu"))
for experiment in json.load(sys.stdin):
    try:
        site(RoundInstructions(1, {"w": np.zeros(3, np.float32)}, json.dumps(experiment)))
    except FedsegError as error:
        print(type(error).__name__, *str(error).splitlines()[:1])
"""
PATCH = {"patch_size": [64, 64, 64]}
OF_ANOTHER = [
    {"model": {"name": "unet", "options": {"widths": [4096] * 6, "residual_units": 8}}},
    {"model": {"name": "dynunet", "options": {"widths": [4096] * 6}}},
    {
        "model": {
            "name": "mlru++",
            "options": {"base_width": 512, "depths": [2] * 6, "stem": [1, 1, 1], "msd_kernels": [15] * 8},
        }
    },
    {
        "model": {
            "name": "rwkv-unet-3d",
            "options": {"widths": [4096] * 4, "expansions": [16] * 4, "decoder_kernel": 15},
        }
    },
    {"model": {"name": "unet", "options": {"widths": [4, 8]}}},
]
"""Networks of up to hundreds of gigabytes, and a small one; three numbers came as their weights."""
TOO_LARGE = [
    {"training": {"patch_size": [10**6] * 3}},
    {"training": {"patch_size": [2048, 2048, 2048]}},
    {"training": {"patch_size": [8, 8, 8], "batch_size": 100_000, "steps_per_epoch": 10**9}},
    {"model": {"name": "unet", "options": {"widths": [10**9, 10**9]}}},
    {"model": {"name": "mlru++", "options": {"depths": [10**6] * 6}}},
    {"evaluation": {"overlap": 0.99999}},
    {"task": {"name": "x", "modality": "mr", "labels": {str(i): i for i in range(100_000)} | {"background": 0}}},
]


def asked(sections):
    return {
        "name": "tiny",
        "task": {"name": "phantom", "modality": "mr", "labels": {"background": 0, "liver": 1}},
        "model": {"name": "unet", "options": {"widths": [4, 8]}},
        "training": PATCH,
        "federation": {"rounds": 2},
    } | sections


def test_a_site_with_a_gigabyte_to_spare_refuses_what_would_need_more():
    """Weights that did not come with the network they are for, and settings that no machine has room for."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        input=json.dumps([asked(sections) for sections in OF_ANOTHER + TOO_LARGE]),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert len(said) == len(OF_ANOTHER + TOO_LARGE)
    for line in said[: len(OF_ANOTHER)]:
        assert line.startswith("ModelError the weights are of another network")
    for line in said[len(OF_ANOTHER) :]:
        assert line.startswith("ConfigError the received experiment: ")


def message(table, size=0):
    header = {"format": FORMAT, "version": "0", "kind": "update"} | SiteUpdate("Aare", 1, {}, 3).header()
    text = json.dumps({"__metadata__": {"fedseg": json.dumps(header)}} | table).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**61], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**61] * 50_000, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**61, 2**61, 0], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1] * 33, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]},
    ],
    ids=["long", "overflowing", "product", "empty", "axes", "more axes"],
)
def test_shapes_that_are_only_declared_take_neither_memory_nor_time(entry):
    with pytest.raises(MessageError):
        SiteUpdate.decode(message({"w": entry}, 4 if entry["data_offsets"][1] else 0))


def test_a_table_that_is_larger_than_any_networks_is_not_parsed():
    header = {"format": FORMAT, "version": "0", "kind": "update"} | SiteUpdate("Aare", 1, {}, 3).header()
    data = b"".join(pack({"w" * 17_000_000: np.zeros(1, np.float32)}, header))
    with pytest.raises(MessageError, match="cut short"):
        SiteUpdate.decode(data)


def bundle(files):
    buffer = BytesIO()
    with ZipFile(buffer, "w", ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return bytearray(buffer.getvalue())


def test_a_bundle_that_unpacks_to_gigabytes_is_refused():
    with pytest.raises(KitError, match="would unpack to more than"):
        bundled_files(bytes(bundle([("a.py", bytes(101_000_000))])), "app.fab")


def test_a_bundle_that_lies_about_its_size_is_refused():
    data = bundle([("a.py", bytes(30_000_000))])
    central = data.rindex(b"PK\x01\x02")
    data[central + 24 : central + 28] = (5).to_bytes(4, "little")
    with pytest.raises(KitError):
        bundled_files(bytes(data), "app.fab")


def test_a_bundle_with_two_files_of_one_name_is_refused():
    """Who looks at one of them has not seen the other, which may be the one that runs."""
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = bundle([("client/app.py", b"good = 1"), ("client/app.py", b"bad = 1")])
    with pytest.raises(KitError, match="more than once"):
        bundled_files(bytes(data), "app.fab")


def test_an_encrypted_bundle_is_refused():
    data = bundle([("a.py", b"app = 1")])
    for place in (6, data.rindex(b"PK\x01\x02") + 8):
        data[place] |= 1
    with pytest.raises(KitError, match="encrypted"):
        bundled_files(bytes(data), "app.fab")


def test_a_bundle_of_ten_thousand_files_is_refused():
    with pytest.raises(KitError, match="files"):
        bundled_files(bytes(bundle((f"{number}.py", b"") for number in range(10_001))), "app.fab")


@pytest.mark.parametrize("name", ["../escape.py", "/etc/passwd", "a\x1b[2Jb.py", "client\\app.py", "a/./b.py"])
def test_a_bundle_with_a_name_that_leads_elsewhere_or_hides_is_refused(name):
    with pytest.raises(FedsegError, match="name"):
        bundled_files(bytes(bundle([(name, b"x")])), "app.fab")


@pytest.mark.parametrize("method", [ZIP_BZIP2, ZIP_LZMA])
def test_a_bundle_is_not_unpacked_by_what_cannot_stop_at_the_size_it_was_told(method):
    buffer = BytesIO()
    with ZipFile(buffer, "w", method) as archive:
        archive.writestr("a.py", bytes(1000))
    with pytest.raises(KitError, match="memory cannot be limited"):
        bundled_files(buffer.getvalue(), "app.fab")


def test_a_bundle_with_damaged_compression_is_refused():
    """Found by the guided search."""
    data = bundle([("a.py", bytes(range(256)) * 40)])
    data[40:60] = b"\xff" * 20
    with pytest.raises(KitError, match="not an app bundle"):
        bundled_files(bytes(data), "app.fab")


def test_who_reads_a_bundle_sees_all_of_it(tmp_path):
    """Code beyond the edge of the window, and code that a terminal would hide, turn round or write over."""
    code = "x = 1" + " " * 300 + "; far = 1\nh = 1  # \x1b[8mhidden\x1b[0m\ny = 'a\u202eb'\nz = 1\rover = 1\n"
    (tmp_path / "app.fab").write_bytes(bytes(bundle([("client/app.py", code.encode())])))
    shown = CliRunner().invoke(app, ["site", "approve", str(tmp_path / "app.fab"), "--show"]).output
    for part in ("far = 1", r"\x1b[8mhidden", r"\u202e", r"\rover = 1"):
        assert part in shown
    assert not {"\x1b", "\u202e", "\r"} & set(shown)


@pytest.mark.parametrize(
    "name", ["client/__pycache__/app.cpython-311.pyc", "client/numpy.so", "client/x.pth", "client/app"]
)
def test_a_bundle_with_code_that_nobody_can_read_is_refused(name):
    with pytest.raises(KitError, match="no text that a person could read"):
        bundled_files(bytes(bundle([("client/app.py", b"app = 1"), (name, b"x")])), "app.fab")
