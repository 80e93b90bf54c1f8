"""Marks of tests that run an engine over the null driver."""

from __future__ import annotations

import shutil

import pytest

NULL_DRIVER = [
    pytest.mark.triton,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
]
