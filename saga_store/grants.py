"""What the application's own role may do: the GRANTs, and the question whether they still hold, as SQL; no I/O."""

EXECUTIONS = "saga_executions"
LOGS = "saga_logs"
ARCHIVES = "saga_archives"
SHARD = "saga_shard"
VERSION_TABLE = "saga_store_version"
# By what it is, for its name may have been taken.
SEQUENCE = f"CASE WHEN to_regclass('{LOGS}') IS NOT NULL THEN pg_get_serial_sequence('{LOGS}', 'id') END"

# PostgreSQL cuts off what is longer, and would then talk of somebody else.
_MAX_IDENTIFIER_BYTES = 63
# Even in quotes these are no names of a role: PUBLIC is everybody, and NONE is nobody.
_RESERVED_ROLES = {"public", "none"}

# What the application gets. Whoever only looks gets SELECT, and nothing on the sequence.
_WANTED = {
    EXECUTIONS: "SELECT, INSERT, UPDATE",
    LOGS: "SELECT, INSERT",
    ARCHIVES: "SELECT",
    SHARD: "SELECT, INSERT",
    VERSION_TABLE: "SELECT",
    SEQUENCE: "USAGE",
}
_WANTED_TO_READ = {
    EXECUTIONS: "SELECT",
    LOGS: "SELECT",
    ARCHIVES: "SELECT",
    SHARD: "SELECT",
    VERSION_TABLE: "SELECT",
    SEQUENCE: "",
}
# The archiver keeps the ledger. It deletes nothing by itself, but by functions that do so as the owner of the tables.
_WANTED_TO_ARCHIVE = {**_WANTED_TO_READ, ARCHIVES: "SELECT, INSERT, UPDATE"}
MAKE_STUBS = "saga_store_make_stubs"
FORGET_STUBS = "saga_store_forget_stubs"
_FUNCTIONS = {
    MAKE_STUBS: f"{MAKE_STUBS}(uuid, uuid[], bigint[], bigint[], bigint[])",
    FORGET_STUBS: f"{FORGET_STUBS}(uuid[], double precision)",
}

_SCRIPT = """\
-- {role_name} may {may}, and no more.
-- Run this as the owner of the tables, and again after every migration that adds a table.
BEGIN;

-- From here on names are those of one schema, whatever else there is along the search path.
DO $place$
BEGIN
    IF {place} IS NULL OR to_regnamespace(quote_ident({place})) IS NULL THEN
        RAISE invalid_schema_name USING MESSAGE = format('there is no schema %s', {place}),
            HINT = 'Name the schema of the tables: saga-store grants --schema NAME.';
    END IF;
    PERFORM set_config('search_path', quote_ident({place}) || ', pg_temp', TRUE);
    IF to_regclass('{logs}') IS NULL THEN
        RAISE undefined_table USING MESSAGE = format('there is no table {logs} in schema %I', current_schema()),
            HINT = 'Migrate first, or name the schema of the tables: saga-store grants --schema NAME.';
    END IF;
    -- GRANT and REVOKE by somebody who may not only warn.
    IF NOT pg_has_role(current_user, (SELECT relowner FROM pg_class WHERE oid = '{logs}'::regclass), 'USAGE') THEN
        RAISE insufficient_privilege USING
            MESSAGE = format('%I may not grant on %I', current_user, '{logs}'),
            HINT = 'Run this as the owner of the tables.';
    END IF;
END
$place$;

-- Whatever it was granted before ends here, by default privileges, too; nobody sees the moment in between.
REVOKE ALL ON TABLE {executions}, {logs}, {archives}, {shard}, {version} FROM {role};
{grants}

-- The sequence has another name where this one was taken.
DO $names$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', current_schema(), {role_text});
    EXECUTE format('REVOKE ALL ON SEQUENCE %s FROM %I', pg_get_serial_sequence('{logs}', 'id'), {role_text});{sequence}
END
$names$;

-- A superuser, the owner, a member of either, or everybody by way of PUBLIC could do more.
DO $check$
DECLARE
    faults text := (SELECT string_agg(fault, E'\n' ORDER BY fault) FROM ({faults}) AS found);
BEGIN
    IF faults IS NOT NULL THEN
        RAISE EXCEPTION USING
            MESSAGE = format('%I could do other things than it should, so nothing was granted:', {role_text})
                || E'\\n' || faults,
            HINT = 'Give the application a role of its own, which neither is nor belongs to the owner of the tables'
                ' or a superuser; and take back what PUBLIC and the roles that it belongs to may do (\\dp, \\du).';
    END IF;
END
$check$;

COMMIT;
"""

# What the archiver may have deleted, and nothing else: the entries of sagas that are finished, not held, and what their
# marks say, by an archive that the ledger calls VERIFIED; and stubs without entries. As in sqlalchemy/retention_sql.py,
# rows are locked first and compared later, by a statement of its own, whose snapshot is younger than the locks.
_ARCHIVER = """
CREATE OR REPLACE FUNCTION {make_stubs}(
    archive_id uuid, saga_ids uuid[], versions bigint[], counts bigint[], last_ids bigint[]
) RETURNS SETOF uuid LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_material = off AS $stubs$
DECLARE
    verified timestamptz;
    locked uuid[];
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'sagas are let go at READ COMMITTED only';
    END IF;
    SELECT a.archived_at INTO verified FROM {archives} a WHERE a.id = archive_id AND a.state = 'VERIFIED'
    FOR NO KEY UPDATE;
    locked := ARRAY(
        SELECT e.id
        FROM unnest(saga_ids, versions) AS mark (id, version)
        CROSS JOIN LATERAL (
            SELECT s.id FROM {executions} s
            WHERE s.id = mark.id AND s.version = mark.version AND s.archived_at IS NULL AND s.updated_at <= verified
                AND s.status IN ('COMPLETED', 'FAILED')
                AND (s.lease_owner IS NULL OR s.lease_expires_at <= statement_timestamp())
                AND (s.retain_until IS NULL OR s.retain_until <= statement_timestamp())
            FOR UPDATE SKIP LOCKED
        ) e
    );
    RETURN QUERY
    WITH same AS MATERIALIZED (
        SELECT mark.id
        FROM unnest(saga_ids, counts, last_ids) AS mark (id, entries, last_id)
        CROSS JOIN LATERAL (
            SELECT count(*) AS entries, COALESCE(max(l.id), 0) AS last_id
            FROM {logs} l
            WHERE l.saga_id = mark.id
            OFFSET 0
        ) found
        WHERE mark.id = ANY (locked) AND found.entries = mark.entries AND found.last_id = mark.last_id
    ), removed AS (
        DELETE FROM {logs} l USING same WHERE l.saga_id = same.id
    ), stubs AS (
        UPDATE {executions} e SET context = '{{}}', archived_at = verified, retain_until = NULL, lease_owner = NULL,
            lease_expires_at = NULL
        FROM same WHERE e.id = same.id
        RETURNING e.id
    ), counted AS (
        UPDATE {archives} a SET removed = a.removed + (SELECT count(*) FROM stubs) WHERE a.id = archive_id
    )
    SELECT stubs.id FROM stubs;
END
$stubs$;
CREATE OR REPLACE FUNCTION {forget_stubs}(saga_ids uuid[], seconds double precision) RETURNS SETOF uuid
LANGUAGE sql SECURITY DEFINER SET search_path FROM CURRENT AS $forget$
    DELETE FROM {executions} e
    WHERE e.id = ANY (saga_ids) AND e.archived_at <= statement_timestamp() - make_interval(secs => seconds)
        AND NOT EXISTS (SELECT FROM {logs} l WHERE l.saga_id = e.id)
    RETURNING e.id
$forget$;
DO $owner$
DECLARE
    owner name := (SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = '{logs}'::regclass);
BEGIN
    EXECUTE format('ALTER FUNCTION {make_stubs_arguments} OWNER TO %I', owner);
    EXECUTE format('ALTER FUNCTION {forget_stubs_arguments} OWNER TO %I', owner);
END
$owner$;
REVOKE ALL ON FUNCTION {make_stubs_arguments}, {forget_stubs_arguments} FROM PUBLIC;
GRANT EXECUTE ON FUNCTION {make_stubs_arguments}, {forget_stubs_arguments} TO {role};"""
# Who isn't an archiver any more.
_NO_ARCHIVER = """
DO $functions$
BEGIN
    IF to_regprocedure('{make_stubs_arguments}') IS NOT NULL THEN
        REVOKE ALL ON FUNCTION {make_stubs_arguments}, {forget_stubs_arguments} FROM {role};
    END IF;
END
$functions$;"""

# A line for each thing that the role can do and shouldn't, or should and can't, in the schema that comes first in the
# search path. What a role may do that it belongs to counts, inherited or not, for it can SET ROLE to that.
_FAULTS = """
WITH me AS (SELECT oid, rolname, rolsuper, rolcreaterole FROM pg_roles WHERE rolname = {role}),
objects AS (
    SELECT c.oid, w.kind, c.relname AS name, c.relowner AS owner, w.wanted
    FROM (VALUES {objects}) AS w (kind, found, wanted) JOIN pg_class c ON c.oid = to_regclass(w.found)
),
others AS (
    SELECT r.oid, r.rolname, r.rolsuper
    FROM me JOIN pg_roles r ON r.oid <> me.oid AND pg_has_role(me.oid, r.oid, 'MEMBER') AND NOT me.rolsuper
),
owners AS (
    SELECT owner, 'the tables' AS what FROM objects
    UNION SELECT nspowner, 'the schema' FROM pg_namespace WHERE nspname = current_schema()
),
privileges AS (
    SELECT 'TABLE' AS kind, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']
        || CASE WHEN CAST(current_setting('server_version_num') AS integer) >= 170000 THEN ARRAY['MAINTAIN'] END
    ) AS name
    UNION ALL SELECT 'SEQUENCE', unnest(ARRAY['USAGE', 'UPDATE'])
),
held AS (
    SELECT holder.oid AS holder, o.name AS object, o.kind, o.wanted, p.name AS privilege,
        p.name = ANY (string_to_array(o.wanted, ', ')) AS is_wanted, holder.oid IN (SELECT oid FROM me) AS is_mine,
        CASE o.kind WHEN 'SEQUENCE' THEN has_sequence_privilege(holder.oid, o.oid, p.name)
            ELSE has_table_privilege(holder.oid, o.oid, p.name) END AS is_held,
        CASE WHEN o.kind = 'SEQUENCE' THEN has_sequence_privilege('public', o.oid, p.name)
            WHEN p.name IN ('INSERT', 'UPDATE', 'REFERENCES') THEN has_any_column_privilege('public', o.oid, p.name)
            ELSE has_table_privilege('public', o.oid, p.name) END AS is_everybodys,
        CASE WHEN o.kind = 'TABLE' AND p.name IN ('INSERT', 'UPDATE', 'REFERENCES')
            THEN has_any_column_privilege(holder.oid, o.oid, p.name) ELSE FALSE END AS is_held_in_part
    FROM (SELECT oid FROM me WHERE NOT rolsuper UNION ALL SELECT oid FROM others WHERE NOT rolsuper) AS holder
    CROSS JOIN objects o JOIN privileges p ON p.kind = o.kind
    WHERE holder.oid NOT IN (SELECT owner FROM owners)
)
SELECT 'there is no role of this name' AS fault WHERE NOT EXISTS (SELECT FROM me)
UNION ALL SELECT 'there is no table ' || w.found || ' here' FROM (VALUES {objects}) AS w (kind, found, wanted)
    WHERE w.kind = 'TABLE' AND to_regclass(w.found) IS NULL
UNION ALL SELECT 'it is a superuser' FROM me WHERE rolsuper
UNION ALL SELECT 'it belongs to ' || quote_ident(rolname) || ', a superuser' FROM others WHERE rolsuper
UNION ALL SELECT 'it may make itself a member of other roles (CREATEROLE)' FROM me
    WHERE rolcreaterole AND NOT rolsuper AND CAST(current_setting('server_version_num') AS integer) < 160000
UNION ALL SELECT 'it belongs to ' || rolname || ', which may do anything on the server' FROM others
    WHERE rolname IN ('pg_execute_server_program', 'pg_write_server_files')
UNION ALL SELECT 'it owns ' || what FROM owners JOIN me ON me.oid = owner WHERE NOT rolsuper
UNION ALL SELECT 'it belongs to ' || quote_ident(rolname) || ', which owns ' || what
    FROM owners JOIN others ON others.oid = owner WHERE NOT rolsuper
UNION ALL SELECT 'it may ' || privilege || ' on ' || quote_ident(object)
        || CASE WHEN bool_or(is_held) THEN '' ELSE ', some columns' END
        || CASE WHEN bool_or(is_everybodys)
                THEN format(', as everybody may: REVOKE %s ON %s %I FROM PUBLIC', privilege, kind, object)
            ELSE COALESCE(' as ' || string_agg(quote_ident(pg_get_userbyid(holder)), ', ') FILTER (WHERE NOT is_mine),
                '') END
    FROM held WHERE (is_held OR is_held_in_part) AND NOT is_wanted AND privilege <> 'SELECT'
    GROUP BY object, kind, privilege
UNION ALL SELECT 'it may not ' || privilege || ' on ' || quote_ident(object)
    FROM held WHERE is_mine AND is_wanted AND NOT is_held
UNION ALL SELECT CASE WHEN w.is_wanted THEN 'it may not ' ELSE 'it may ' END || 'execute ' || w.name
    FROM me CROSS JOIN (VALUES {functions}) AS w (name, function, is_wanted)
    WHERE NOT me.rolsuper AND NOT EXISTS (SELECT FROM owners WHERE owner = me.oid) AND w.is_wanted <> COALESCE(
        has_function_privilege(me.oid, to_regprocedure(w.function), 'EXECUTE'), FALSE)
UNION ALL SELECT 'it may not use the schema' FROM me WHERE NOT has_schema_privilege(me.oid, current_schema(), 'USAGE')
"""


def grants(role: str, *, schema: str | None = "public", read_only: bool = False, archiver: bool = False) -> str:
    """Return the SQL that lets a role use the storage, and no more: a script in one transaction, for psql.

    With it the role may read, insert and update ``saga_executions``, read and insert ``saga_logs`` and ``saga_shard``,
    and read the ledger of archives and the version table; ``read_only``, for views and reports: read them all, and
    nothing else. It may neither change nor delete history, nor delete sagas, nor alter the tables, nor turn back their
    sequence: what it was granted on them before is revoked. The script fails, and changes nothing, if the role doesn't
    exist, if a table doesn't, or if the role could do more than that all the same, as the owner of the tables could.

    Args:
        role: The role that the application connects as, spelled as in ``pg_roles``.
        schema: The schema that the tables are in; None for the first one of the session's search_path that exists.
        read_only: Whether the role shall only read.
        archiver: Whether the role is the archiver's: it may read, write the ledger of archives, and call two functions
            that delete, as the owner of the tables, what may be deleted: the entries of sagas that are finished, not
            held and unchanged, by an archive that the ledger calls VERIFIED; and stubs. It can't delete, insert or
            update sagas and entries otherwise. Whether the ledger is right PostgreSQL can't tell: the archiver writes
            it. Nor is a policy known to it.

    Raises:
        ValueError: A role that both is the archiver's and only reads; a name that PostgreSQL can't have: empty, longer
            than 63 bytes, with NUL; or PUBLIC for a role.
    """
    check_names(role, schema)
    wanted = _wanted(read_only=read_only, archiver=archiver)
    named = {
        "executions": EXECUTIONS,
        "logs": LOGS,
        "archives": ARCHIVES,
        "make_stubs": MAKE_STUBS,
        "make_stubs_arguments": _FUNCTIONS[MAKE_STUBS],
        "forget_stubs": FORGET_STUBS,
        "forget_stubs_arguments": _FUNCTIONS[FORGET_STUBS],
        "role": _identifier(role),
    }
    tables = [name for name in wanted if name != SEQUENCE]
    return _SCRIPT.format(
        # A comment ends with its line.
        role_name=" ".join(role.splitlines()),
        may=_may(read_only=read_only, archiver=archiver),
        place="current_schema()" if schema is None else _literal(schema),
        role=_identifier(role),
        role_text=_literal(role),
        executions=EXECUTIONS,
        logs=LOGS,
        archives=ARCHIVES,
        shard=SHARD,
        version=VERSION_TABLE,
        grants="\n".join(f"GRANT {wanted[table]} ON TABLE {table} TO {_identifier(role)};" for table in tables)
        + (_ARCHIVER if archiver else _NO_ARCHIVER).format(**named),
        sequence=""
        if not wanted[SEQUENCE]
        else f"""
    EXECUTE format('GRANT USAGE ON SEQUENCE %s TO %I', pg_get_serial_sequence('{LOGS}', 'id'), {_literal(role)});""",
        faults=faults_query(_literal(role), read_only=read_only, archiver=archiver),
    )


def _wanted(*, read_only: bool, archiver: bool) -> dict[str, str]:
    if read_only and archiver:
        raise ValueError("a role that only reads can't be the archiver's: give one of read_only and archiver")
    return _WANTED_TO_ARCHIVE if archiver else _WANTED_TO_READ if read_only else _WANTED


def _may(*, read_only: bool, archiver: bool) -> str:
    if archiver:
        return "read sagas and their history, write the ledger of archives, and let go what is archived"
    if read_only:
        return "read sagas and their history"
    return "read, insert and update sagas, and read and insert their history, which is append-only"


def faults_query(role: str, *, read_only: bool = False, archiver: bool = False) -> str:
    """Return the query for what of the privileges isn't as ``grants`` makes them; the role is a literal or a parameter.

    It returns a text for each fault, of the schema that comes first in the search path.
    """
    wanted = _wanted(read_only=read_only, archiver=archiver)
    rows = [f"('TABLE', '{name}', '{privileges}')" for name, privileges in wanted.items() if name != SEQUENCE]
    rows.append(f"('SEQUENCE', {SEQUENCE}, '{wanted[SEQUENCE]}')")
    functions = [f"('{name}', '{arguments}', {archiver})" for name, arguments in _FUNCTIONS.items()]
    return _FAULTS.format(role=role, objects=", ".join(rows), functions=", ".join(functions))


def check_names(role: str, schema: str | None) -> None:
    """Raise ValueError for what can be no name in PostgreSQL, or is more than one role."""
    check_name("role", role)
    if role.lower() in _RESERVED_ROLES:
        raise ValueError(f"role must be a single role, not {role!r}: give the application a role of its own")
    if schema is not None:
        check_schema(schema)


def check_schema(name: str) -> None:
    """Raise ValueError for what can be no schema, or none that a search_path can name."""
    check_name("schema", name)
    if name == "$user" or name.startswith("pg_"):
        raise ValueError(f"schema must not be {name!r}, which has a meaning of its own in a search_path: take another")


def check_name(what: str, name: str) -> None:
    """Raise ValueError for what can be no name in PostgreSQL."""
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
