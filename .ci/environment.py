"""Make a virtual environment with the checkout and one of its extras in it: .ci/environment.py FOLDER EXTRA.

pip's lines go to a file, and the terminal gets signs of life; if pip fails, the end of that file and what to do.
It runs on any Python from 3.11 on, and needs nothing installed.
"""

import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVERY = 25  # libraries, from one sign of life to the next
SHOWN = 12  # lines of what pip said
# What pip says, and what is to be done; the first that is found counts.
REMEDIES = {
    r"No space left on device": "The disk is full: an environment takes about 1.5 GB.",
    r"CERTIFICATE_VERIFY_FAILED": (
        "The certificate of pip's index isn't known here: PIP_CERT=/path/to/ca.pem says whom to trust."
    ),
    r"Failed to establish a new connection|Temporary failure in name|Read timed out|Cannot connect to proxy": (
        "pip doesn't reach its index. HTTPS_PROXY names a proxy, and PIP_INDEX_URL an index of your own."
    ),
    r"command '\S*(?:gcc|cc)' failed|No such file or directory: '\S*(?:gcc|cc)'": (
        "A library has to be compiled here. On Debian and Ubuntu: apt-get install build-essential python3-dev"
    ),
    r"No matching distribution found for (\S+)": "pip's index has no {} for this Python on this machine.",
}


def main(folder: str, extra: str) -> int:
    began = time.monotonic()
    log = Path(folder, "pip.log")
    version = sys.version.split()[0]
    tell(f"==> Making {folder} with Python {version}, once; this takes a minute or two. pip's own words go to {log}.\n")
    venv.create(folder, clear=True, with_pip=True, symlinks=os.name != "nt")
    command = [f"{folder}/bin/python", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    with (
        log.open("w", buffering=1) as kept,
        subprocess.Popen(
            [*command, "--progress-bar=off", "--editable", f"{ROOT}[{extra}]"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"PYTHONUNBUFFERED": "1"},  # or its lines come by the hundred
        ) as pip,
    ):
        assert pip.stdout
        follow(pip.stdout, kept.write)
    if pip.returncode:
        said = log.read_text()
        print(*said.splitlines()[-SHOWN:], f"pip failed; all that it said is in {log}.", sep="\n", file=sys.stderr)
        print(*remedies(said), sep="\n", file=sys.stderr)
        return 1
    tell(f"    ready after {time.monotonic() - began:.0f} s\n")
    return 0


def follow(lines: Iterable[str], keep: Callable[[str], object]) -> None:
    found = 0
    tell("    finding libraries:")
    for line in lines:
        keep(line)
        if line.startswith("Collecting "):
            found += 1
            if found % EVERY == 0:
                tell(f" {found}")
        elif line.startswith("Installing collected packages:"):
            tell(f"\n    installing {line.count(',') + 1} of them")
    tell("\n")


def remedies(said: str) -> list[str]:
    hits = ((re.search(pattern, said), remedy) for pattern, remedy in REMEDIES.items())
    return [remedy.format(*hit.groups()) for hit, remedy in hits if hit][:1]


def tell(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
