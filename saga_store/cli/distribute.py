"""The verb that hands the schemas of shards to Citus."""

import argparse

from sqlalchemy import Connection, text

from saga_store.cli.console import Console
from saga_store.cli.exits import Exit
from saga_store.cli.migrate import given_url
from saga_store.cli.shards import Shards, add_shards
from saga_store.cli.verbs import Verbs
from saga_store.schema.connections import connected


def register(verbs: Verbs) -> None:
    parser = verbs.add("distribute", _distribute, summary="Hand the schemas of shards to Citus.", database=True)
    add_shards(parser, "whose schemas: saga_00 to saga_NN, or what a TOML file says", required=True)


def _distribute(given: argparse.Namespace, console: Console) -> int:
    shards: Shards = given.shards
    if any(shard.url is not None or shard.schema is None for shard in shards.places):
        return console.fail(ValueError("distribute needs --shards N, or a file of schemas without URLs"), Exit.USAGE)
    schemas = [shard.schema for shard in shards.places]

    def distribute(connection: Connection) -> list[str] | None:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        if connection.scalar(text("SELECT extversion FROM pg_extension WHERE extname = 'citus'")) is None:
            return None
        placed = "SELECT nspname FROM pg_dist_schema JOIN pg_namespace n ON n.oid = schemaid"
        there = {name for (name,) in connection.execute(text(placed))}
        left = [name for name in schemas if name not in there]
        for name in left:
            handed_on = "SELECT citus_schema_distribute(CAST(quote_ident(CAST(:name AS text)) AS regnamespace))"
            connection.execute(text(handed_on), {"name": name})
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
