"""The command in a terminal of its own: what a person sees of it, and what they type."""

import errno
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
_PATIENCE = 60
# Colours and weights, which are all that may come besides text.
SGR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Terminal:
    """A command that runs in a terminal; ``seen`` is all that it has written there."""

    process: "subprocess.Popen[bytes]"
    descriptor: int
    seen: bytearray = field(default_factory=bytearray)

    @classmethod
    @contextmanager
    def running(
        cls, *command: str, columns: int, module: str = "saga_store", **environment: str
    ) -> Iterator["Terminal"]:
        """Run ``saga-store`` with these arguments, or another module, on a terminal that is so wide."""
        controller, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        settings = {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", "TZ": "UTC"} | environment
        inherited = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "NO_COLOR"}}
        process = subprocess.Popen(
            [sys.executable, "-m", module, *command],
            cwd=ROOT,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=inherited | settings,
            start_new_session=True,
            preexec_fn=_be_at_a_terminal,  # noqa: PLW1509 - no threads here
        )
        os.close(terminal)
        running = cls(process, controller)
        try:
            yield running
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            os.close(controller)

    def wait_for(self, text: str) -> None:
        """Read until the text has been seen."""
        deadline = time.monotonic() + _PATIENCE
        while text.encode() not in self.seen:
            assert self._read(deadline), f"ended without {text!r}: {self.seen.decode(errors='replace')}"

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def end(self) -> int:
        """Read to the end, and return the exit code."""
        deadline = time.monotonic() + _PATIENCE
        while self._read(deadline):
            pass
        return self.process.wait(_PATIENCE)

    @property
    def raw(self) -> str:
        return self.seen.decode().replace("\r\n", "\n")

    @property
    def text(self) -> str:
        """What is to be read there, without colours."""
        return "".join(f"{line.rstrip()}\n" for line in SGR.sub("", self.raw).splitlines())

    def _read(self, deadline: float) -> bool:
        left = deadline - time.monotonic()
        assert left > 0, f"too slow: {self.seen.decode(errors='replace')}"
        ready, _, _ = select.select([self.descriptor], [], [], left)
        if not ready:
            return True
        try:
            read = os.read(self.descriptor, 65_536)
        except OSError as exc:
            if exc.errno != errno.EIO:  # so Linux says that nobody has the terminal open any more
                raise
            return False
        self.seen += read
        return bool(read)


def _be_at_a_terminal() -> None:
    """Let Ctrl-C there interrupt the process."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def shown(*command: str, columns: int, **environment: str) -> tuple[int, Terminal]:
    """Run a command to its end."""
    with Terminal.running(*command, columns=columns, **environment) as terminal:
        return terminal.end(), terminal
