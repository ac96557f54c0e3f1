"""Failures are named when they happen, which is minutes before pytest prints what it knows of them."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Listen where something is printed: the processes of xdist send their reports to the one that started them."""
    if terminal := config.pluginmanager.get_plugin("terminalreporter"):
        config.pluginmanager.register(Announcer(terminal))


class Announcer:
    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)  # a string, if it failed before it ran
            message = crash.message if crash else str(report.longrepr)
            what = "FAILED" if report.when == "call" else f"FAILED in {report.when}"
            if self._terminal.config.get_verbosity() <= 0:
                self._terminal.write("\n")  # the letters of the tests before stand in this line
            self._terminal.write_line(f"{what} {report.nodeid}: {message.strip().partition(chr(10))[0]}", red=True)
