"""A process that adopts or undoes, again and again, in children that a test kills.

python -m tests.adopter URL: for each line of its input, adopt or undo, it prints the child's id, and how it ended.
"""

import os
import sys
from datetime import timedelta

from saga_store import adoption

PATIENCE = timedelta(minutes=1)


def main() -> None:
    url = sys.argv[1]
    for line in sys.stdin:
        child = os.fork()
        if not child:
            goal = adoption.undo if line.strip() == "undo" else adoption.adopt
            goal(url, rewrite_below=0, lock_wait=PATIENCE)
            os._exit(0)
        print(child, flush=True)  # noqa: T201 - what the test reads
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201 - what the test reads


if __name__ == "__main__":
    main()
