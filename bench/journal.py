"""A pytest plugin that writes down each test as it begins and ends: `python -m pytest -p bench.journal`.

A line of JSON for each: {"test", "outcome", "seconds", "text"}, the outcome "begun", "passed", "failed" or "skipped".
So what ran before a crash, a hang or a lost device is known. A kernel that reads where it must not costs the whole
process its device: the process then ends at once with `LOST`, for the rest to be run in another.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

FILE = "PYCKPT_TEST_JOURNAL"  # the environment variable that names it
LOST = 75
_LONGEST_TEXT = 6000
# CUDA errors after which nothing runs in the process any more.
_FATAL = (
    "illegal memory access",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "illegal instruction",
    "launch timed out",
    "hardware stack error",
    "invalid program counter",
    "address space",
)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines so far, but for one that a killed process left unfinished."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def _write(**line: Any) -> None:
    with open(os.environ[FILE], "a") as out:
        out.write(json.dumps(line) + "\n")


_worst: dict[str, tuple[str, float, str]] = {}


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(test=nodeid, outcome="begun")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of a test's three parts, what went worst."""
    outcome, seconds, text = _worst.get(report.nodeid, ("passed", 0.0, ""))
    if report.outcome != "passed":
        outcome = "failed" if "failed" in (outcome, report.outcome) else "skipped"
        text += str(report.longrepr)
    _worst[report.nodeid] = outcome, seconds + report.duration, text


def pytest_runtest_logfinish(nodeid: str) -> None:
    outcome, seconds, text = _worst.pop(nodeid)
    _write(test=nodeid, outcome=outcome, seconds=round(seconds, 3), text=text[-_LONGEST_TEXT:])
    if outcome == "failed" and any(words in text for words in _FATAL):
        os._exit(LOST)
