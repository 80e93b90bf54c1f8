"""Puts the training tool on the path and gives its generators small texts of our own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .samples import sample_sources

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))


@pytest.fixture(scope="session")
def sources():
    """Texts of our own."""
    return sample_sources()


@pytest.fixture
def generator(sources):
    """A generator with a fixed seed."""
    from demo_training.synth import Generator

    return Generator(7, sources)
