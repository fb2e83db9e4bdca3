"""What many tests need."""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # several processes share the cores: threads of theirs would wait for each other


@pytest.fixture(scope="session")
def hippocampus():
    """Folder of the Medical Segmentation Decathlon's Task04_Hippocampus, where this machine has it."""
    named = os.environ.get("FEDSEG_HIPPOCAMPUS")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data" / "hippocampus"
    if not (folder / "dataset.json").is_file():
        pytest.skip(f"no hippocampus volumes in {folder}; set FEDSEG_HIPPOCAMPUS to their folder")
    return folder


LONGEST = (
    "integration/test_study",
    "tests/test_simulation",
    "models/test_every_network",
    "models/test_export",
    "test_networks_of_images",
    "tests/robustness/",
    "site/test_service",
    "test_engines",
    "test_triton_scan",
    "test_report",
    "models/test_rwkv",
    "models/test_mlru",
    "federated/test_kill",
    "integration/test_finish",
    "test_heterogeneous",
    "tests/models/",
    "tests/site/",
    "tests/coordinator/",
    "tests/federated/",
)
"""Tests that take longest: they come first, so that none of them runs alone at the end while other workers have nothing to do."""


def pytest_collection_modifyitems(items):
    def place(item):
        file = item.nodeid.partition("::")[0]
        return next((number for number, part in enumerate(LONGEST) if part in file), len(LONGEST))

    items.sort(key=place)


def pytest_collection_finish():
    """A collection of garbage need not look at all that torch, MONAI and the tests consist of: thousands of times, it adds up."""
    gc.collect()
    gc.freeze()
