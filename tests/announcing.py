"""What is said of a run before pytest says it: how long it takes, when it begins; each failure, when it happens."""

import time

import pytest

from tests.extent import WHOLE

# Until it has been measured here, by a run that passed.
GUESS = "twenty minutes or so" if WHOLE else "ten minutes or so"
KEPT = f"saga_store/seconds_{'whole' if WHOLE else 'sampled'}"


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Listen where something is printed: the processes of xdist send their reports to the one that started them."""
    if terminal := config.pluginmanager.get_plugin("terminalreporter"):
        config.pluginmanager.register(Announcer(terminal))
        cache: pytest.Cache | None = getattr(config, "cache", None)  # -p no:cacheprovider leaves it out
        if cache is not None and _is_of_all_tests(config):
            config.pluginmanager.register(Stopwatch(cache))


def _is_of_all_tests(config: pytest.Config) -> bool:
    narrowed = config.option.keyword or config.option.markexpr or config.option.collectonly
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not narrowed


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


class Stopwatch:
    """Says how long all tests took when they last passed here, and measures it anew."""

    def __init__(self, cache: pytest.Cache, key: str = KEPT) -> None:
        self._cache = cache
        self._key = key
        self._began = time.monotonic()

    def pytest_report_header(self) -> str:
        seconds = self._cache.get(self._key, None)
        took = f"{seconds / 60:.0f} minutes, when they last passed here" if seconds else f"{GUESS}, on two idle cores"
        extent = "nothing sampled" if WHOLE else "sampled where they take long"
        return f"All tests, {extent}: {took}"

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.OK:
            self._cache.set(self._key, time.monotonic() - self._began)
