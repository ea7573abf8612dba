"""One line below the test run: how many of the planted faults were rejected; and what several files need."""

import sys

import pytest


def pytest_terminal_summary(terminalreporter):
    ran = {
        outcome: sum("::test_mutant_is_rejected[" in report.nodeid for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed", "error")
    }
    if total := sum(ran.values()):
        terminalreporter.write_line(f"planted faults: {ran['passed']} of {total} rejected")


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A plug-in as pip would have installed it: a module, and its entry points."""

    def install(source, entries):
        (tmp_path / "plugged_in.py").write_text(source)
        info = tmp_path / "plugged_in-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-in\nVersion: 1.0\n")
        lines = "".join(f"{name} = plugged_in:{attribute}\n" for name, attribute in entries.items())
        (info / "entry_points.txt").write_text(f"[refmodels.accelerators]\n{lines}")
        monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    sys.modules.pop("plugged_in", None)
