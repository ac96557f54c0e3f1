"""What the command prints, and where: results to stdout, for a person or as JSON; everything else to stderr."""

import json
import logging
import sys

from saga_store.cli.exits import Exit
from saga_store.schema.progress import LogReport, Progress


class Console:
    """Prints results as text, or as one JSON object if the machine asked for that."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._on_terminal = sys.stderr.isatty()
        self._log = LogReport()
        # What is being done, by Alembic's log and ours.
        logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
        for name in ("alembic.runtime.migration", "saga_store"):
            logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger("alembic.runtime.migration").addFilter(_says_what_runs)

    def result(self, text: str, **facts: object) -> None:
        """Print the text, or the facts as JSON."""
        print(json.dumps(facts) if self._as_json else text)

    def report(self, progress: Progress) -> None:
        """Show progress: on a terminal in one line that is written over, in a log by a line now and then."""
        if self._on_terminal:
            print(f"\r\033[K{progress}", end="\n" if progress.finished else "", file=sys.stderr, flush=True)
        else:
            self._log(progress)

    def fail(self, exc: BaseException, code: Exit) -> Exit:
        message = str(getattr(exc, "orig", None) or exc).strip()
        print(f"saga-store: {message}", file=sys.stderr)
        if self._as_json:
            self.result("", error=message, exit_code=code.value)
        return code


def _says_what_runs(record: logging.LogRecord) -> bool:
    """Leave out what Alembic says of itself."""
    return record.getMessage().startswith("Running")
