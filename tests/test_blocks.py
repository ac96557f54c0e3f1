"""What is shown, written to terminals of any width: text and nothing else, and commands that survive being copied."""

import io
import json
import os
import re
import shlex
import subprocess
import unicodedata
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saga_store.cli.blocks import GAP, Bar, Block, Column, Row, Table, as_text, cell, cut, fit, line, shown, width
from saga_store.cli.rich_writer import write
from saga_store.cli.saga_story import continued
from saga_store.cli.sagas_shown import context_text
from tests.terminal import SGR
from tests.test_terminal import FOLDER, HIDDEN

TEXTS = st.text(st.characters(), max_size=60)  # surrogates and controls among them
ROOMS = st.integers(60, 200)
TABLES = st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=4).map(
    lambda rows: Table(
        (
            Column("ONE", least=8, likes=20, wraps=True),
            Column("TWO", least=6, right=True),
            Column("THREE", least=12, leaves=1),
            Column(""),
        ),
        tuple(
            Row(
                (
                    cell(one, "bad", mark="?"),
                    cell(two, short=two[:3]),
                    cell(three),
                    Bar(((0, 0.5, "good"), (0.5, 1, "doubt"))),
                ),
                cell(three, "dim"),
            )
            for one, two, three in rows
        ),
    )
)


def hidden(text: str) -> set[str]:
    return {char for char in text if unicodedata.category(char) in HIDDEN} - {"\n"}


@given(TABLES, TEXTS, ROOMS)
def test_only_text_is_written(table: Table, text: str, room: int) -> None:
    """Whatever the data holds, there is nothing in it but text and our own colours."""
    blocks: list[Block] = [table, line(cell(text, "warning"), "beside"), *shown(text, indent=4)]
    for written in (as_text(blocks, None), as_text(blocks, room)):
        assert hidden(written) == set()
    coloured = write(blocks, io.StringIO(), room)
    assert hidden(SGR.sub("", coloured)) == set()
    assert all(width(each) <= room for each in SGR.sub("", coloured).split("\n"))


@given(TABLES, ROOMS)
def test_columns_fit(table: Table, room: int) -> None:
    """Columns take no more room than there is, and no less than their least; those that may leave go before that."""
    fitting = fit(table, room)
    assert sum(wide for _, wide in fitting) + GAP * (len(fitting) - 1) <= room
    natural = table.natural_widths()
    for index, wide in fitting:
        assert min(natural[index], table.columns[index].least) <= wide <= natural[index]
    assert {0, 1} <= {index for index, _ in fitting}


@given(TEXTS, st.integers(1, 80))
def test_cutting(text: str, room: int) -> None:
    """What is cut fits, and is the beginning."""
    seen = cell(text).text
    found = cut(seen, room)
    assert width(found) <= room
    assert seen.startswith(found.removesuffix("\N{HORIZONTAL ELLIPSIS}")) or seen == found


def test_what_is_wide() -> None:
    """Characters of East Asia take two columns, marks that combine none."""
    assert (width("ab"), width("\u5929\u6c17"), width("e\u0301"), width("\U0001f600")) == (2, 4, 1, 2)


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=90), max_size=6))
def test_a_command_in_lines(words: list[str]) -> None:
    """Is the same command to a shell."""
    command = shlex.join(["saga-store", "saga", "settle", *words])
    assert shlex.split(continued(command).replace(" \\\n", " ")) == shlex.split(command)


@given(st.dictionaries(TEXTS, TEXTS | st.integers() | st.none(), max_size=3))
def test_a_context_can_be_seen(context: dict[str, object]) -> None:
    """As JSON of which every character can be seen, and which means the same."""
    text = context_text(context)
    assert hidden(text) == set()
    assert json.loads(text) == context


@pytest.mark.parametrize("name", ["show_in_doubt", "show_exhausted", "show_held", "hostile_show"])
@pytest.mark.parametrize("columns", [60, 200])
def test_what_is_advised_can_be_copied(tmp_path: Path, name: str, columns: int) -> None:
    """A shell runs what stands there, and nothing else: each command names its verb, one saga, and says why."""
    screen = (FOLDER / f"{name}-{columns}.txt").read_text()
    copied = re.findall(r"^    (saga-store (?:.*\\\n)*.*\n)", screen, re.MULTILINE)
    assert copied
    program = tmp_path / "saga-store"
    program.write_text('#!/bin/sh\nprintf \'%s\\n\' "$#" "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", "-c", "".join(copied)],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{tmp_path}:{os.defpath}"},
    )
    words = done.stdout.splitlines()
    assert done.stderr == ""
    while words:
        count = int(words.pop(0))
        saga, verb, saga_id, *options = words[:count]
        del words[:count]
        assert (saga, verb in {"settle", "retry", "give-up", "break-lease"}) == ("saga", True)
        assert str(UUID(saga_id)) == saga_id
        assert set(options[::2]) <= {"--entry", "--status", "--expected-version", "--reason"}
        assert options[-2] == "--reason"
