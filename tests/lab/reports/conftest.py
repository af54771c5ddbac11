import pytest


@pytest.fixture(autouse=True)
def _blank_figures() -> None:
    """Here figures are drawn."""
