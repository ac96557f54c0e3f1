"""All of the service on this machine: a PostgreSQL, the migration, two web processes and a worker; Ctrl-C ends it.

``python -m examples.service [--ports 8000 8001]``, from the project's root; DATABASE_URL names another database.
"""

import argparse
import asyncio
import os
import sys
import time
from contextlib import ExitStack

from sqlalchemy import make_url

from examples.service.migrate import create_tables
from examples.service.processes import Processes
from saga_store import schema
from saga_store.testing.postgres import PostgresUnavailableError, embedded

HINT = """
The service runs, at http://127.0.0.1:{port} and http://127.0.0.1:{other}; Ctrl-C ends it. Place an order:

  curl -X PUT http://127.0.0.1:{port}/orders/$(python3 -c 'import uuid; print(uuid.uuid4())') \\
      -H 'Content-Type: application/json' -d '{{"item": "coffee", "quantity": 2, "price": 24, "address": "here"}}'

  http://127.0.0.1:{port}/ops/sagas/  the sagas      http://127.0.0.1:{port}/docs  the API
  http://127.0.0.1:{port}/metrics     for Prometheus http://127.0.0.1:{port}/ready  for whoever deploys
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.service", description=__doc__.partition("\n")[0])
    parser.add_argument("--ports", type=int, nargs=2, default=[8000, 8001], help="of the two web processes")
    ports = parser.parse_args().ports
    with ExitStack() as stack:
        given = os.environ.get("DATABASE_URL") or stack.enter_context(embedded()).url
        url = make_url(given).set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
        schema.upgrade(url)
        asyncio.run(create_tables(url))
        processes = Processes(url, ports)
        stack.enter_context(processes.running())
        processes.wait_until_ready()
        print(HINT.format(port=ports[0], other=ports[1]), flush=True)  # noqa: T201 - to whoever has started it
        while not (name := processes.ended()):
            time.sleep(0.5)
        raise RuntimeError(f"{name} has ended")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except (PostgresUnavailableError, RuntimeError) as exc:
        sys.exit(str(exc))
