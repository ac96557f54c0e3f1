"""The processes of the service, as children of this one: started, asked whether they are ready, killed, stopped."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 60.0


class Processes:
    """Web processes, one for each port, and a worker; what they say goes to ``log``, or where this one's does."""

    def __init__(
        self, url: str, ports: list[int], settings: Mapping[str, str] | None = None, *, log: Path | None = None
    ) -> None:
        web = ["uvicorn", "examples.service.web:app", "--host", "127.0.0.1", "--no-access-log", "--port"]
        self.ports = ports
        self._commands = {f"web {port}": [*web, str(port)] for port in ports} | {"worker": ["examples.service.worker"]}
        self._environment = os.environ | {"DATABASE_URL": url} | dict(settings or {})
        self._log = log
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._commands)

    def start(self, name: str) -> None:
        command = [sys.executable, "-m", *self._commands[name]]
        with ExitStack() as stack:
            out = stack.enter_context(self._log.open("ab")) if self._log else None
            self._running[name] = subprocess.Popen(  # noqa: S603 - our own
                command, cwd=ROOT, env=self._environment, stdout=out, stderr=out
            )

    def kill(self, name: str) -> None:
        """End it as a crash does."""
        self._running[name].kill()
        self._running[name].wait()

    def ended(self) -> str | None:
        """Return the name of one that has ended by itself."""
        return next((name for name, process in self._running.items() if process.poll() is not None), None)

    def wait_until_ready(self) -> None:
        """Wait until all web processes answer that they are ready."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        for port in self.ports:
            while not _is_ready(port):
                if (name := self.ended()) or time.monotonic() > give_up:
                    raise RuntimeError(f"{name} has ended" if name else f"port {port} isn't ready")
                time.sleep(0.1)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start them all; stop them in the end, as a deployment would, and kill what doesn't."""
        try:
            for name in self.names:
                self.start(name)
            yield
        finally:
            for process in self._running.values():
                process.send_signal(signal.SIGTERM)
            for process in self._running.values():
                try:
                    process.wait(PATIENCE_SECONDS)
                finally:
                    process.kill()


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)  # noqa: PLR2004 - OK
    except (OSError, urllib.error.URLError):
        return False
