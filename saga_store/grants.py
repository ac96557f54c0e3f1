"""What the application's own role may do: the GRANTs, as SQL on paper; no I/O."""

EXECUTIONS = "saga_executions"
LOGS = "saga_logs"
LOGS_SEQUENCE = "saga_logs_id_seq"
VERSION_TABLE = "saga_store_version"

# PostgreSQL cuts off what is longer, and would then talk of somebody else.
_MAX_IDENTIFIER_BYTES = 63
# Even in quotes these are no names of a role: PUBLIC is everybody, and NONE is nobody.
_RESERVED_ROLES = {"public", "none"}

_SCRIPT = """\
-- {role_name} may read, insert and update sagas, and read and insert their history, which is append-only.
-- Run this as the owner of the tables, and again after every migration that adds a table.
BEGIN;

-- GRANT and REVOKE by somebody who may not only warn.
DO $check$
BEGIN
    IF NOT pg_has_role(current_user, (SELECT relowner FROM pg_class WHERE oid = {logs_text}::regclass), 'USAGE') THEN
        RAISE insufficient_privilege USING
            MESSAGE = format('%I may not grant on %s', current_user, {logs_text}),
            HINT = 'Run this as the owner of the tables.';
    END IF;
END
$check$;

GRANT USAGE ON SCHEMA {schema} TO {role};

-- Whatever it was granted before ends here; nobody sees the moment in between.
REVOKE ALL ON TABLE {executions}, {logs} FROM {role};
REVOKE ALL ON SEQUENCE {sequence} FROM {role};
GRANT SELECT, INSERT, UPDATE ON TABLE {executions} TO {role};
GRANT SELECT, INSERT ON TABLE {logs} TO {role};
GRANT USAGE ON SEQUENCE {sequence} TO {role};
-- So that the storage can say which migration is missing.
GRANT SELECT ON TABLE {version} TO {role};

-- A superuser, the owner, a member of either or of pg_write_all_data, or everybody by way of PUBLIC could do more.
DO $check$
BEGIN
    IF pg_has_role({role_text}, (SELECT relowner FROM pg_class WHERE oid = {logs_text}::regclass), 'MEMBER')
        OR has_any_column_privilege({role_text}, {logs_text}, 'UPDATE')
        OR has_table_privilege({role_text}, {logs_text}, 'DELETE, TRUNCATE')
        OR has_table_privilege({role_text}, {executions_text}, 'DELETE, TRUNCATE')
    THEN
        RAISE EXCEPTION USING
            MESSAGE = format('%I could still change or delete history, so nothing was granted', {role_text}),
            HINT = 'Give the application a role of its own, which neither is nor belongs to the owner of the tables'
                ' or a superuser; and look for privileges of PUBLIC and of the roles that it belongs to (\\dp, \\du).';
    END IF;
END
$check$;

COMMIT;
"""


def grants(role: str, *, schema: str = "public") -> str:
    """Return the SQL that lets a role use the storage, and no more: a script in one transaction, for psql.

    With it the role may read, insert and update ``saga_executions``, read and insert ``saga_logs``, and read the
    version table. It may neither change nor delete history, nor delete sagas, nor alter the tables: what it was granted
    on the first two before is revoked. The script fails, and changes nothing, if the role doesn't exist, if a table
    doesn't, or if the role could do more than that all the same, as the owner of the tables could.

    Args:
        role: The role that the application connects as, spelled as in ``pg_roles``.
        schema: The schema that the tables are in.

    Raises:
        ValueError: A name that PostgreSQL can't have: empty, longer than 63 bytes, with NUL; or PUBLIC for a role.
    """
    _check_name("role", role)
    if role.lower() in _RESERVED_ROLES:
        raise ValueError(f"role must be a single role, not {role!r}: give the application a role of its own")
    _check_name("schema", schema)

    def table(name: str) -> str:
        return f"{_identifier(schema)}.{_identifier(name)}"

    return _SCRIPT.format(
        # A comment ends with its line.
        role_name=" ".join(role.splitlines()),
        role=_identifier(role),
        role_text=_literal(role),
        schema=_identifier(schema),
        executions=table(EXECUTIONS),
        executions_text=_literal(table(EXECUTIONS)),
        logs=table(LOGS),
        logs_text=_literal(table(LOGS)),
        sequence=table(LOGS_SEQUENCE),
        version=table(VERSION_TABLE),
    )


def _check_name(what: str, name: str) -> None:
    if not name:
        raise ValueError(f"{what} must not be empty")
    if "\0" in name:
        raise ValueError(f"{what} must not contain NUL: {name!r}")
    try:
        size = len(name.encode())
    except UnicodeEncodeError as exc:
        raise ValueError(f"{what} must be text that UTF-8 can hold, not {name!r}") from exc
    if size > _MAX_IDENTIFIER_BYTES:
        raise ValueError(
            f"{what} must be at most {_MAX_IDENTIFIER_BYTES} bytes long, as PostgreSQL's names are, not {size}: "
            f"{name!r}"
        )


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    """Quote for any setting of standard_conforming_strings, and for a place between dollar quotes."""
    quoted = text.replace("\\", "\\\\").replace("'", "''").replace("$", "\\x24")
    return f"E'{quoted}'"
