"""What holds for every test."""

import pytest


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    """LightningCLI warns where arguments come from Python while the process (pytest) has its own."""
    monkeypatch.setattr("sys.argv", ["sample.py"])
