"""Results of tests, written as they come: ``-p tests.progress --progress FILE``.

Pytest's own reports are written when all is over. A test that never ends takes them along, and is
then the one that this file says was started and nothing else. For runs that may be out of time,
``--first`` says whose tests are worth most.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--progress", metavar="FILE", help="a line of JSON for each start and result")
    parser.addoption("--first", metavar="FILE", help="tests of this file come before others")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--progress")
    if path and not hasattr(config, "workerinput"):  # xdist's first process hears of all tests
        config.pluginmanager.register(Progress(Path(path)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if first := config.getoption("--first"):
        items.sort(key=lambda item: item.nodeid.split("::")[0] != first)


class Progress:
    """Writes the lines."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(test=nodeid, outcome="started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._result(report, when=report.when, seconds=round(report.duration, 2))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._result(report, when="collect")

    def _result(self, report: Any, **more: Any) -> None:
        text = {"text": report.longreprtext[-4000:]} if report.failed else {}
        self._write(test=report.nodeid, outcome=report.outcome, **more, **text)

    def _write(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")
