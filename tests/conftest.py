"""What many tests need."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def hippocampus():
    """Folder of the Medical Segmentation Decathlon's Task04_Hippocampus, where this machine has it."""
    named = os.environ.get("FEDSEG_HIPPOCAMPUS")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data" / "hippocampus"
    if not (folder / "dataset.json").is_file():
        pytest.skip(f"no hippocampus volumes in {folder}; set FEDSEG_HIPPOCAMPUS to their folder")
    return folder


def pytest_collection_modifyitems(items):
    """What mostly waits for other processes comes first, so that it does not run alone at the end on one of two workers."""
    items.sort(key=lambda item: "integration/test_study" not in item.nodeid)
