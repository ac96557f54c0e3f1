"""docs/get-started.md, typed as it stands: in an environment by its own line, with the PostgreSQL that it starts."""

import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.environments import copy_checkout, make_environment
from tests.pages import Block, blocks_of
from tests.wheel import Environment

PAGE = "docs/get-started.md"
BLOCKS = blocks_of(PAGE)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """What the page's first block makes: nothing is there but what its line asks for."""
    folder = tmp_path_factory.mktemp("newcomer")
    install = next(line for line in BLOCKS[0].text.splitlines() if line.startswith("pip install"))
    found = re.fullmatch(r"pip install '\.\./saga-store\[([\w,]+)\]'", install)
    assert found
    checkout = copy_checkout(folder / "saga-store")
    return make_environment(folder / "shop" / "venv", found[1].split(","), "plain", checkout)


@pytest.fixture(scope="module")
def url(environment: Environment) -> Iterator[str]:
    """Where the server of the first terminal is, by the line that it prints."""
    [line] = [block.text.strip() for block in BLOCKS if "saga_store.testing.postgres" in block.text]
    program, *arguments = shlex.split(line)
    with subprocess.Popen(
        [environment.programs / program, *arguments], cwd="/", stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout
        try:
            assert server.stdout.readline().startswith("# PostgreSQL ")
            [name] = shlex.split(server.stdout.readline())[1:]
            yield name.removeprefix("DATABASE_URL=")
        finally:
            server.send_signal(signal.SIGINT)
    assert server.returncode == 0


def shown(block: Block) -> str:
    """Return what the page shows as a pattern; the shell's own word about a killed program is no output of it."""
    lines = [line for line in block.text.splitlines() if line != "Killed"]
    return "\n".join(re.escape(line).replace(r"\.\.\.", ".+") for line in lines) + "\n"


def test_the_page(environment: Environment, url: str, tmp_path: Path) -> None:
    """A saga runs, is killed, and is recovered, and each command prints what the page shows."""
    folder = environment.folder.parent
    compared = 0
    [program] = [block.text for block in BLOCKS if block.language == "python"]
    (folder / "shop.py").write_text(program)
    after_the_server = BLOCKS[BLOCKS.index(next(block for block in BLOCKS if "upgrade" in block.text)) :]
    for block, following in pairwise([*after_the_server, BLOCKS[0]]):
        if block.language != "sh":
            continue
        # A terminal has each line at once, a pipe only what was flushed before the program was killed.
        settings = {"DATABASE_URL": url, "HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
        done = environment.run("sh", "-ec", block.text, cwd=folder, settings=settings)
        is_killed = following.language == "text" and "Killed" in following.text
        assert done.returncode == (128 + signal.SIGKILL if is_killed else 0) or (
            is_killed and done.returncode == -signal.SIGKILL
        ), done.stdout + done.stderr
        if following.language == "text":
            assert re.fullmatch(shown(following), done.stdout), done.stdout
            compared += 1
    assert compared == 3
