"""One command for all shards, `--shards`; and the verb that hands their schemas to Citus."""

import argparse
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from saga_store.cli.carrying import carry_out
from saga_store.cli.console import Console, warn
from saga_store.cli.exits import Exit
from saga_store.cli.migrate import given_url
from saga_store.cli.verbs import Run, Verbs
from saga_store.grants import check_schema
from saga_store.schema.connections import connected
from saga_store.shard_records import MOST_SHARDS

# Of several exit codes the worst counts: the last of these.
_SEVERITY = (
    *(Exit.DONE, Exit.ATTENTION, Exit.AHEAD, Exit.BEHIND, Exit.DRIFTED, Exit.PARTLY, Exit.REFUSED),
    *(Exit.LOCKED, Exit.USAGE, Exit.FAILED, Exit.INTERRUPTED),
)


class Shard(NamedTuple):
    """Where a shard is; without a URL, where the command's own says."""

    url: str | None
    schema: str | None


def register(verbs: Verbs) -> None:
    verbs.add("distribute", _distribute, summary="Hand the schemas of shards to Citus.", database=True)
    for name in ("upgrade", "downgrade", "stamp", "current", "check", "sql", "grants", "distribute"):
        parser = verbs.parser(name)
        parser.add_argument(
            "--shards",
            metavar="N|FILE",
            type=_shards,
            required=name == "distribute",
            help="do it for each shard in turn: schemas saga_00 to saga_NN of the database, or what a TOML file says",
        )
        if name != "distribute":
            parser.set_defaults(run=_over_shards(parser.get_default("run"), is_script=name in {"sql", "grants"}))


def _shards(value: str) -> list[Shard]:
    """Read a number of schemas, or a file with a table ``[[shards]]`` for each, of ``url`` and ``schema``."""
    if value.isascii() and value.isdigit():
        if not 1 <= int(value) <= MOST_SHARDS:
            raise argparse.ArgumentTypeError(f"must be 1 to {MOST_SHARDS}, not {value}")
        return [Shard(None, f"saga_{number:02}") for number in range(int(value))]
    try:
        found = tomllib.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise argparse.ArgumentTypeError(f"{value!r} is no number, and no TOML file that can be read: {exc}") from exc
    tables = found.get("shards")
    if not isinstance(tables, list) or not 1 <= len(tables) <= MOST_SHARDS or set(found) != {"shards"}:
        raise argparse.ArgumentTypeError(f"{value}: must have 1 to {MOST_SHARDS} tables [[shards]], and nothing else")
    shards = [_shard(f"{value}: shard {number}", table) for number, table in enumerate(tables)]
    if len(set(shards)) < len(shards):
        raise argparse.ArgumentTypeError(f"{value}: two shards have the same url and schema")
    return shards


def _shard(where: str, table: Any) -> Shard:  # noqa: ANN401 - whatever stands in the file
    if not isinstance(table, dict) or not table or not set(table) <= {"url", "schema"}:
        raise argparse.ArgumentTypeError(f"{where}: must be a table with url, schema, or both, and nothing else")
    if not all(isinstance(value, str) for value in table.values()):
        raise argparse.ArgumentTypeError(f"{where}: url and schema must be strings")
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


def _over_shards(run: Run, *, is_script: bool) -> Run:
    """Return a verb that does the same for one shard after the other, and goes on with the next if one fails."""

    def run_all(given: argparse.Namespace, console: Console) -> int:
        shards: list[Shard] | None = given.shards
        if shards is None:
            return run(given, console)
        if given.schema is not None:
            return console.fail(
                ValueError("--schema and --shards can't be given together: shards have theirs"), Exit.USAGE
            )
        codes: list[Exit] = []
        told: list[dict[str, object]] = []
        for number, shard in enumerate(shards):
            name = f"shard {number}" + (f", schema {shard.schema}" if shard.schema else "")
            own = argparse.Namespace(**{**vars(given), "schema": shard.schema})
            if shard.url is not None:
                own.url = shard.url
            if not is_script:
                warn(name)
            own_console = _ShardConsole(f"-- {name}" if is_script else f"{name}:", as_json=given.json)
            code = carry_out(run, own, own_console)
            codes.append(next(known for known in Exit if known == code))
            told.append({"shard": number, "schema": shard.schema, "exit_code": codes[-1].value, **own_console.facts})
            if codes[-1] is Exit.INTERRUPTED:
                break
        worst = max(codes, key=_SEVERITY.index)
        if given.json:
            console.result("", shards=told, exit_code=worst.value)
        failed = [f"shard {number}: {code.meaning}" for number, code in enumerate(codes) if code is not Exit.DONE]
        if len(codes) < len(shards):
            failed.append(f"not begun: {len(shards) - len(codes)} of {len(shards)}")
        done = f"{codes.count(Exit.DONE)} of {len(shards)} shards done"
        warn("; ".join([done, *failed]) + ("; run it again when that is mended" if failed else ""))
        return worst

    return run_all


def _distribute(given: argparse.Namespace, console: Console) -> int:
    shards: list[Shard] = given.shards
    if any(shard.url is not None or shard.schema is None for shard in shards):
        return console.fail(ValueError("distribute needs --shards N, or a file of schemas without URLs"), Exit.USAGE)
    schemas = [shard.schema for shard in shards]

    def distribute(connection: Connection) -> list[str] | None:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        if connection.scalar(text("SELECT extversion FROM pg_extension WHERE extname = 'citus'")) is None:
            return None
        placed = "SELECT schemaid::regnamespace::text FROM pg_dist_schema"
        there = {name for (name,) in connection.execute(text(placed))}
        left = [name for name in schemas if name not in there]
        for name in left:
            connection.execute(
                text("SELECT citus_schema_distribute(CAST(CAST(:name AS text) AS regnamespace))"), {"name": name}
            )
        return [str(name) for name in left]

    handed = connected(given_url(given), distribute)
    if handed is None:
        reason = (
            "there is no Citus in this database: shards on ordinary servers need no distributing. On a Citus cluster, "
            "CREATE EXTENSION citus (12 or later) on its coordinator, and give its URL"
        )
        return console.fail(ValueError(reason), Exit.FAILED)
    console.result(f"handed to Citus: {', '.join(handed)}" if handed else "nothing to do", distributed=handed)
    return Exit.DONE
