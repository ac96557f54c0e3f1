"""Whether a role may still do what ``grants`` lets it do, and no more."""

from sqlalchemy import Connection, text

from saga_store.grants import check_names, faults_query
from saga_store.schema.connections import Bind, connected
from saga_store.schema.scripts import VERSION_TABLE
from saga_store.schema.session import enter_schema
from saga_store.schema.settings import MigrationError

_READABLE = text("""
    SELECT current_user, current_schema(),
        COALESCE(has_table_privilege(to_regclass(quote_ident(current_schema()) || '.' || :table), 'SELECT'), TRUE)
""")
_EXISTS = text("SELECT TRUE FROM pg_namespace WHERE nspname = :schema")


def check_grants(
    bind: Bind, role: str, *, schema: str | None = None, read_only: bool = False, archiver: bool = False
) -> list[str]:
    """Return what of a role's privileges isn't as the script of ``saga_store.grants.grants`` makes them, a line each.

    Privileges that the role has by PUBLIC, by default privileges and by the roles that it belongs to count as well.
    The database is read, and nothing else; any role may ask.

    Raises:
        ValueError: A name that PostgreSQL can't have; both ``read_only`` and ``archiver``.
        MigrationError: The database can't be reached, or there is no such schema.
    """
    check_names(role, schema)
    query = faults_query("CAST(:role AS text)", read_only=read_only, archiver=archiver)
    return connected(bind, lambda connection: _read_faults(connection, role, schema, query))


def require_readable(connection: Connection, schema: str | None) -> None:
    """Raise MigrationError if this role can't see whether there are tables in the schema that was entered.

    What it may not see would look like what isn't there.
    """
    user, place, readable = connection.execute(_READABLE, {"table": VERSION_TABLE}).one()
    if place is None and (schema is None or connection.scalar(_EXISTS, {"schema": schema})):
        where = f"schema {schema}" if schema else "any schema of its search_path, if there is one"
        raise MigrationError(f"{user} may not use {where}: {_remedy(user, schema)}")
    if not readable:
        raise MigrationError(f"{user} may not read {VERSION_TABLE} in schema {place}: {_remedy(user, schema)}")


def _remedy(user: str, schema: str | None) -> str:
    place = f" --schema {schema}" if schema else ""
    return (
        f"have the owner of the tables run the script of `saga-store grants --role {user}{place}`, or ask as the role "
        "that migrates"
    )


def _read_faults(connection: Connection, role: str, schema: str | None, query: str) -> list[str]:
    with connection.begin():
        enter_schema(connection, schema)
        if connection.scalar(text("SELECT current_schema()")) is None:
            raise MigrationError(
                f"there is no schema {schema!r}, or you may not use it: correct the name, or have USAGE on it granted"
                if schema
                else "no schema of the session's search_path is there, or you may use none of them: name one as schema"
            )
        return sorted(connection.scalars(text(query), {"role": role}))
