"""The checks send nothing where a route leads out."""

from __future__ import annotations

import os

import pytest

from rehearsal.progress import RehearsalError
from verify.client import Client
from verify.lab import sealed


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_a_client_refuses_a_network_that_leads_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A door left open: the namespace that the rehearsal enters is the machine's own."""
    from contextlib import nullcontext

    from rehearsal import network

    monkeypatch.setattr(network, "enter", lambda namespace: nullcontext())
    client = Client("nowhere", sealed("mail-obs-internet"))
    with pytest.raises(RehearsalError):
        client.connect("192.0.2.25", 25, timeout=1)
