"""How pytest and nbval run the notebooks: offline, quietly, and with a table of seconds."""

import os
from collections import defaultdict

import pytest

# Whatever asks for the network meets a closed door, and the cell that asked fails.
NOWHERE = "http://127.0.0.1:9"
PROXIES = {name: NOWHERE for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
LOCAL = {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}
os.environ.update(PROXIES | LOCAL | {"COURSE_QUIET": "1"})


def pytest_itemcollected(item):
    if hasattr(item, "output_timeout"):
        item.output_timeout = 60  # nbval waits 5 s for an output: too short on a busy machine


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """Print the seconds that each notebook took."""
    seconds = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            file = getattr(report, "nodeid", "").split("::")[0]
            if file.endswith(".ipynb") and hasattr(report, "duration"):
                seconds[file] += report.duration
    if seconds:
        terminalreporter.section("seconds per notebook")
        for file, taken in sorted(seconds.items()):
            terminalreporter.write_line(f"{taken:7.1f}  {file}")
