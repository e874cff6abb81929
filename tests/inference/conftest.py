"""Fixtures of the sampler's tests."""

import pytest


@pytest.fixture
def one_wave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an idle worker wait long enough for all requests of a test, so that counts are exact on a slow machine."""
    monkeypatch.setattr("matryoshka.inference.sampler.GATHER_S", 0.3)
