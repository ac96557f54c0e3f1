"""Verbs of the command, as tests run them in their own process."""

import json
from collections.abc import Callable
from typing import Any, TypeAlias

from saga_store.cli.exits import Exit

Command: TypeAlias = Callable[..., tuple[int, str, str]]
"""Runs a verb; returns its exit code, and what it printed to stdout and stderr."""


def facts(command: Command, *line: str, code: Exit = Exit.DONE) -> Any:  # noqa: ANN401 - JSON
    """Return what a verb tells a machine, having ended like that."""
    found, out, err = command(*line, "--json")
    assert found == code, out + err
    return json.loads(out)
