"""One line below the test run: how many of the planted faults were rejected."""


def pytest_terminal_summary(terminalreporter):
    ran = {
        outcome: sum("::test_mutant_is_rejected[" in report.nodeid for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed", "error")
    }
    if total := sum(ran.values()):
        terminalreporter.write_line(f"planted faults: {ran['passed']} of {total} rejected")
