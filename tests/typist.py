"""Several commands in one process, each with a line before it that shows what was typed.

python -m tests.typist 'saga list' 'saga stuck'
"""

import shlex
import sys

from saga_store.cli import main

PROMPT = "$ saga-store "

if __name__ == "__main__":
    for typed in sys.argv[1:]:
        print(f"{PROMPT}{typed}", flush=True)  # noqa: T201 - as a shell shows it
        print(f"[{main(shlex.split(typed))}]", flush=True)  # noqa: T201 - the exit code
