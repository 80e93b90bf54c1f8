"""A plug-in of pytest for a session that has to end in time and shall say how far it came.

`python -m pytest -p benchmarks._deadline`: no test is begun after the second of the clock that
FD_DSA_TESTS_END names; it is skipped. The identifiers of those that passed, or had nothing to do
here, are added to the file that FD_DSA_TESTS_DONE names.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from pathlib import Path

import pytest

END_VARIABLE, DONE_VARIABLE = "FD_DSA_TESTS_END", "FD_DSA_TESTS_DONE"
NO_TIME = "no time left"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what there is no time for."""
    if time.time() > float(os.environ[END_VARIABLE]):
        pytest.skip(NO_TIME)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note a test that is done."""
    report = yield
    passed = report.when == "call" and report.passed
    if passed or (report.skipped and NO_TIME not in str(report.longrepr)):
        with Path(os.environ[DONE_VARIABLE]).open("a") as file:
            file.write(f"{item.nodeid}\n")
    return report
