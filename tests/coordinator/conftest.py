import pytest

from tests.coordinator.studies import Studies


@pytest.fixture
def study(tmp_path):
    """A study with two sites, not yet provisioned."""
    studies = Studies(tmp_path)
    studies.write("Aare", "Elbe")
    return studies
