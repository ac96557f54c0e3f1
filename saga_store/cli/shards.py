"""``--shards``: where the shards are, and how a verb does the same for one after the other."""

import argparse
import logging
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from saga_store.cli.carrying import carry_out
from saga_store.cli.console import Console, warn
from saga_store.cli.exits import Exit, worst_of
from saga_store.cli.migrate import given_url
from saga_store.cli.verbs import Run, Verbs
from saga_store.grants import check_schema
from saga_store.retention.over_shards import share_of
from saga_store.schema.settings import MigrationError
from saga_store.schema.urls import Address, bare
from saga_store.shard_records import MOST_SHARDS

IN_TURN = "do it for each shard in turn"
ALL_AT_ONCE = "of all shards, as one"

# A server that doesn't even refuse mustn't keep all others waiting; a URL may say something else.
_CONNECT_SECONDS = 10


class Shard(NamedTuple):
    """Where a shard is; without a URL, where the command's own says."""

    url: str | None
    schema: str | None


class Shards(NamedTuple):
    """Where all of them are, in order; and what was ``given`` to say so."""

    given: str
    places: tuple[Shard, ...]

    def name(self, index: int) -> str:
        schema = self.places[index].schema
        return f"shard {index}" + (f", schema {schema}" if schema else "")


def register(verbs: Verbs) -> None:
    """Have the verbs that migrate do the same for all shards."""
    for name in ("upgrade", "downgrade", "stamp", "current", "check", "sql", "grants"):
        parser = verbs.parser(name)
        add_shards(parser, IN_TURN)
        parser.set_defaults(run=in_turn(parser.get_default("run"), is_script=name in {"sql", "grants"}))


def add_shards(parser: argparse.ArgumentParser, says: str, *, required: bool = False) -> None:
    parser.add_argument(
        "--shards",
        metavar="N|FILE",
        type=_shards,
        required=required,
        help=f"{says}: schemas saga_00 to saga_NN of the database, or what a TOML file says",
    )


def places_of(given: argparse.Namespace) -> dict[str, str]:
    """Return the options by which a command finds the same tables."""
    shards: Shards | None = given.shards
    if shards is not None:
        return {"--shards": shards.given}
    return {} if given.schema is None else {"--schema": given.schema}


def _shards(value: str) -> Shards:
    """Read a number of schemas, or a file with a table ``[[shards]]`` for each, of ``url`` and ``schema``."""
    if value.isascii() and value.isdigit():
        if not 1 <= int(value) <= MOST_SHARDS:
            raise argparse.ArgumentTypeError(f"must be 1 to {MOST_SHARDS}, not {value}")
        return Shards(value, tuple(Shard(None, f"saga_{number:02}") for number in range(int(value))))
    try:
        found = tomllib.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise argparse.ArgumentTypeError(f"{value!r} is no number, and no TOML file that can be read: {exc}") from exc
    tables = found.get("shards")
    if not isinstance(tables, list) or not 1 <= len(tables) <= MOST_SHARDS or set(found) != {"shards"}:
        raise argparse.ArgumentTypeError(f"{value}: must have 1 to {MOST_SHARDS} tables [[shards]], and nothing else")
    shards = tuple(_shard(f"{value}: shard {number}", table) for number, table in enumerate(tables))
    if len(set(shards)) < len(shards):
        raise argparse.ArgumentTypeError(f"{value}: two shards have the same url and schema")
    return Shards(value, shards)


def _shard(where: str, table: Any) -> Shard:  # noqa: ANN401 - whatever stands in the file
    if not isinstance(table, dict) or not table or not set(table) <= {"url", "schema"}:
        raise argparse.ArgumentTypeError(f"{where}: must be a table with url, schema, or both, and nothing else")
    if not all(isinstance(value, str) for value in table.values()):
        raise argparse.ArgumentTypeError(f"{where}: url and schema must be strings")
    if not table.get("url", "url").strip():
        raise argparse.ArgumentTypeError(f"{where}: url must not be empty; leave it out for the command's own")
    shard = Shard(table.get("url"), table.get("schema"))
    if shard.schema is not None:
        try:
            check_schema(shard.schema)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"{where}: {exc}") from exc
    return shard


class _ShardConsole(Console):
    """Prints what concerns one shard under its name; for a machine it is kept, to be one object with the others."""

    def __init__(self, title: str, *, as_json: bool) -> None:
        super().__init__(as_json=as_json)
        self._title = title
        self.facts: dict[str, object] = {}

    def product(self, text: str, **facts: object) -> None:
        if self._as_json:
            self.facts |= facts
        else:
            super().product(f"{self._title}\n{text}")


def in_turn(
    run: Run,
    *,
    is_script: bool = False,
    before: Run = lambda *_: Exit.DONE,
) -> Run:
    """Return a verb that does the same for one shard after the other, and goes on with the next if one fails.

    What is given as ``--max-seconds`` is shared out. A signal that was to end one ends all, even if that one fails.

    Args:
        run: Does it for one, or without shards.
        is_script: Whether what it prints is SQL, where a shard's name has to be a comment.
        before: Called before the first; unless it returns that it is done, nothing is.
    """

    def run_all(given: argparse.Namespace, console: Console) -> int:
        shards: Shards | None = given.shards
        if shards is None:
            return run(given, console)
        if (code := before(given, console)) != Exit.DONE:
            return code
        began = time.monotonic()
        codes: list[Exit] = []
        told: list[dict[str, object]] = []
        for number, shard in enumerate(shards.places):
            name = shards.name(number)
            if not is_script:
                warn(name)
            own = _given_for(given, shard)
            if hasattr(own, "max_seconds"):
                passed = time.monotonic() - began
                own.max_seconds = share_of(given.max_seconds, len(shards.places), passed=passed, done=number)
            own_console = _ShardConsole(f"-- {name}" if is_script else f"{name}:", as_json=given.json)
            # That there are tables in other schemas is as it has to be.
            with leaving_out("saga_store.migrations", "elsewhere"):
                code = carry_out(run, own, own_console)
            if own.signalled:
                code = Exit.INTERRUPTED
            codes.append(next(known for known in Exit if known == code))
            told.append({"shard": number, "schema": shard.schema, "exit_code": codes[-1].value, **own_console.facts})
            if codes[-1] in {Exit.INTERRUPTED, Exit.USAGE}:
                break
        worst = worst_of(codes)
        if given.json:
            console.result("", shards=told, exit_code=worst.value)
        warn(_summary(codes, len(shards.places)))
        return worst

    return run_all


@contextmanager
def leaving_out(logger_name: str, mark: str) -> Iterator[None]:
    """Leave out of a log the records that have this attribute."""
    logger = logging.getLogger(logger_name)

    def is_unmarked(record: logging.LogRecord) -> bool:
        return not hasattr(record, mark)

    logger.addFilter(is_unmarked)
    try:
        yield
    finally:
        logger.removeFilter(is_unmarked)


def url_of(shard: Shard, given: argparse.Namespace) -> str:
    """Return where a shard is, for a connection that is given up in time."""
    url = shard.url or given_url(given)
    try:
        said = Address.read(url).said
    except MigrationError:
        return url  # whoever connects tells why
    if "connect_timeout" in said:
        return url
    url = bare(url)
    return f"{url}{'&' if '?' in url else '?'}connect_timeout={_CONNECT_SECONDS}"


def _given_for(given: argparse.Namespace, shard: Shard) -> argparse.Namespace:
    """Return what is given for one shard; ``signalled`` becomes true if a signal is to end the run."""
    own = argparse.Namespace(**{**vars(given), "schema": shard.schema, "shards": None, "signalled": False})
    if hasattr(given, "url"):
        own.url = url_of(shard, given)
    return own


def _summary(codes: Sequence[Exit], count: int) -> str:
    ended = [(number, code.meaning.partition(";")[0]) for number, code in enumerate(codes) if code is not Exit.DONE]
    failed = [f"shard {number}: {how}" for number, how in ended]
    if len(codes) < count:
        failed.append(f"not begun: {count - len(codes)} of {count}")
    done = f"{codes.count(Exit.DONE)} of {count} shards done"
    return "; ".join([done, *failed]) + ("; run it again when that is mended" if failed else "")
