"""What the tests of kept weights share."""

import pytest
import serving

from vssm.weights import download


@pytest.fixture
def server(monkeypatch):
    """A scripted web server; nobody waits between attempts."""
    monkeypatch.setattr(download, "_PAUSE_S", 0)
    with serving.running() as running:
        yield running
