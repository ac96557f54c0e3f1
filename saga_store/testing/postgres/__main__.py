"""A PostgreSQL to try things out on: ``python -m saga_store.testing.postgres``, until Ctrl-C.

It prints the line for another shell that says where the server is. An argument says which kind, as ``serve`` takes it;
embedded unless given.
"""

import shlex
import signal
import sys
import threading
from collections.abc import Sequence

from saga_store.testing.postgres import PostgresUnavailableError, serve


def main(arguments: Sequence[str]) -> int:
    choice = arguments[0] if arguments else "embedded"
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        with serve(choice) as server:
            url = server.url.replace("postgresql://", "postgresql+psycopg://", 1)
            sys.stdout.write(f"# PostgreSQL {server.version}, until Ctrl-C\nexport DATABASE_URL={shlex.quote(url)}\n")
            sys.stdout.flush()
            stopped.wait()
    except PostgresUnavailableError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
