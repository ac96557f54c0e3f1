"""Run faults at servers, their connections and four client processes, and say what became of every write.

python -m tests.crash [--faults N] [--seed S] [--clients N] [--shards N] [--definite]
"""

import argparse
import asyncio
import secrets
import signal
import sys
from pathlib import Path

from tests.crash.plan import Plan
from tests.crash.report import summary
from tests.crash.run import crash

LATEST = Path(__file__).parent.parent.parent / ".crash" / "latest.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--faults", type=int, default=220, help="how many kills, cuts and the like (220)")
    parser.add_argument("--clients", type=int, default=4, help="client processes (4)")
    parser.add_argument("--tasks", type=int, default=8, help="tasks of each client (8)")
    parser.add_argument("--shards", type=int, default=1, help="servers, each a shard of one storage (1: not sharded)")
    parser.add_argument("--seed", default=secrets.token_hex(4), help="chooses the faults and what clients write")
    parser.add_argument("--data", type=Path, help="a folder for the servers' data and the journals")
    parser.add_argument(
        "--definite",
        action="store_true",
        help="fail if a write with a version stays unknown, and not because others outran it",
    )
    options = parser.parse_args()
    print(f"seed {options.seed} (the same again: --seed {options.seed})", flush=True)  # noqa: T201 - a program's output
    # So that what was started is stopped, and the disk unmounted.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    plan = Plan(
        options.seed, options.faults, options.clients, options.tasks, folder=options.data, shards=options.shards
    )
    result = asyncio.run(crash(plan, sys.stdout))
    result.save(LATEST)
    print(summary(result))  # noqa: T201 - as above
    return int(result.failed(definite=options.definite))


if __name__ == "__main__":
    sys.exit(main())
