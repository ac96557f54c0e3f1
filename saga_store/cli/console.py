"""What the command prints, and where: results to stdout, for a person or as JSON; everything else to stderr.

A line that can't be written (a full disk, a reader that has gone, a descriptor that is closed) undoes nothing, and so
never makes a failure of work that was done; what is asked for only to be read fails with it.
"""

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO

from saga_store.cli.exits import Exit
from saga_store.inspection import visible
from saga_store.schema.settings import LogReport, Progress


class UnprintableError(Exception):
    """What was asked for couldn't be written to stdout; without a message if nobody wants to read on."""


class Console:
    """Prints results as text, or as one JSON object if the machine asked for that."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._has_printed = False
        self._on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._log = LogReport()
        # What is being done, by Alembic's log and ours.
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Visible("%(message)s"))
        logging.basicConfig(handlers=[handler], level=logging.WARNING)
        for name in ("alembic.runtime.migration", "saga_store"):
            logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger("alembic.runtime.migration").addFilter(_says_what_runs)

    def result(self, text: str, **facts: object) -> None:
        """Print what was done, or what the exit code tells as well: the text, or the facts as JSON."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        with _undoing_nothing():
            self.product(text.encode(encoding, "backslashreplace").decode(encoding), **facts)

    def product(self, text: str, **facts: object) -> None:
        """Print what the command was called for.

        Raises:
            UnprintableError: It couldn't be written.
        """
        _print(json.dumps(facts) if self._as_json else text)
        self._has_printed = True

    def lines(self, facts: Iterable[Mapping[str, object]]) -> None:
        """Print what the command was called for, as JSON, an object a line, each when it comes.

        Raises:
            UnprintableError: It couldn't be written.
        """
        for each in facts:
            _print(json.dumps(each))

    def results(self, facts: Iterable[Mapping[str, object]]) -> None:
        """Print what was done, as JSON, an object a line."""
        with _undoing_nothing():
            self.lines(facts)

    def exactly(self, text: str) -> None:
        """Print what a program reads, in UTF-8 whatever the locale; for a person's terminal nothing in it is invisible.

        Raises:
            UnprintableError: It couldn't be written.
        """
        if sys.stdout is None:
            raise UnprintableError("stdout is closed")
        try:
            if sys.stdout.isatty():
                text = "\n".join(map(visible, text.split("\n")))
            sys.stdout.flush()
            sys.stdout.buffer.write(text.encode())
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            _give_up(sys.stdout)
            raise UnprintableError from None
        except (OSError, ValueError) as exc:
            _give_up(sys.stdout)
            raise UnprintableError(f"stdout: {exc}") from None

    def report(self, progress: Progress) -> None:
        """Show progress: on a terminal in one line that is written over, in a log by a line now and then."""
        if self._on_terminal:
            write(sys.stderr, f"\r\033[K{progress}" + ("\n" if progress.finished else ""))
        else:
            self._log(progress)

    def fail(self, exc: BaseException, code: Exit) -> Exit:
        message = str(getattr(exc, "orig", None) or exc).strip()
        if message:
            warn(message)
        if self._as_json and not self._has_printed:  # one object, which tells what was done
            self.result("", error=message, exit_code=code.value)
        return code


def warn(message: str) -> None:
    """Say something to whoever reads stderr, with every character visible."""
    write(sys.stderr, f"saga-store: {_visible_lines(message)}\n")


def close() -> None:
    """Flush both, so that Python has nothing left to write when it exits, nor another exit code to give."""
    for stream in (sys.stdout, sys.stderr):
        write(stream, "")


@contextmanager
def _undoing_nothing() -> Iterator[None]:
    try:
        yield
    except UnprintableError as exc:
        if str(exc):
            warn(f"what was done couldn't be printed: {exc}")


def _print(text: str) -> None:
    if sys.stdout is None:
        raise UnprintableError("stdout is closed")
    try:
        # A script in which a letter was replaced would name something else.
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads the output has had enough, as `head` does.
        _give_up(sys.stdout)
        raise UnprintableError from None
    except UnicodeEncodeError as exc:
        raise UnprintableError(
            f"stdout is {exc.encoding}, which has no {exc.object[exc.start]!a}: set PYTHONIOENCODING=utf-8, or "
            "have it as --json"
        ) from None
    except (OSError, ValueError) as exc:
        _give_up(sys.stdout)
        raise UnprintableError(f"stdout: {exc}") from None


class _Visible(logging.Formatter):
    """Writes what is logged so that every character of the data in it can be seen."""

    def format(self, record: logging.LogRecord) -> str:
        return _visible_lines(super().format(record))


def _visible_lines(text: str) -> str:
    return "\n".join(map(visible, text.split("\n")))


def write(stream: IO[str] | None, text: str) -> None:
    """Write it if that is possible."""
    if stream is None:
        return
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        _give_up(stream)


def _give_up(stream: IO[str]) -> None:
    """Let what is still in its buffer, and all that follows, go nowhere."""
    with suppress(OSError, ValueError):
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _says_what_runs(record: logging.LogRecord) -> bool:
    """Leave out what Alembic says of itself."""
    return record.getMessage().startswith("Running")
