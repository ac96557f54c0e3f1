"""What a role lacks to see sagas, or to intervene: the GRANTs, worked out from the catalog, which any role may read."""

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from saga_store.grants import EXECUTIONS, LOGS

# By what they are, for without USAGE on their schema names lead nowhere. Of several schemas that have such tables the
# first of the search path is meant, and one that the role may not enter isn't found along it.
_LACKING = text(f"""
WITH place AS (
    SELECT n.oid, n.nspname, e.oid AS executions, l.oid AS logs,
        (SELECT s.oid FROM pg_depend d JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S'
         WHERE d.classid = 'pg_class'::regclass AND d.refobjid = l.oid LIMIT 1) AS sequence
    FROM pg_namespace n
    JOIN pg_class e ON e.relnamespace = n.oid AND e.relname = '{EXECUTIONS}'
    JOIN pg_class l ON l.relnamespace = n.oid AND l.relname = '{LOGS}'
    WHERE n.nspname = COALESCE(CAST(:schema AS text), n.nspname)
    ORDER BY array_position(current_schemas(FALSE), n.nspname) NULLS LAST, n.nspname
    LIMIT 1
), wanted AS (
    SELECT 1 AS position, 'TABLE' AS kind, executions AS object, p AS privilege
    FROM place, unnest(CAST(CASE WHEN :writes THEN '{{SELECT,UPDATE}}' ELSE '{{SELECT}}' END AS text[])) AS p
    UNION ALL
    SELECT 2, 'TABLE', logs, p
    FROM place, unnest(CAST(CASE WHEN :writes THEN '{{SELECT,INSERT}}' ELSE '{{SELECT}}' END AS text[])) AS p
    UNION ALL
    SELECT 3, 'SEQUENCE', sequence, 'USAGE' FROM place WHERE :writes AND sequence IS NOT NULL
)
SELECT CAST(current_user AS text), CAST(grant_text AS text)
FROM (
    SELECT 0 AS position, format('GRANT USAGE ON SCHEMA %I TO %I;', nspname, current_user) AS grant_text
    FROM place
    WHERE NOT has_schema_privilege(oid, 'USAGE')
    UNION ALL
    SELECT w.position, format('GRANT %s ON %s %I.%I TO %I;', string_agg(w.privilege, ', ' ORDER BY w.privilege DESC),
        w.kind, p.nspname, c.relname, current_user)
    FROM wanted w JOIN pg_class c ON c.oid = w.object CROSS JOIN place p
    WHERE NOT CASE w.kind WHEN 'TABLE' THEN has_table_privilege(w.object, w.privilege)
        ELSE has_sequence_privilege(w.object, w.privilege) END
    GROUP BY w.position, w.kind, p.nspname, c.relname
) lacking
ORDER BY position
""")  # noqa: S608 - its SQL is put together from the names of our own tables


async def lacking(engine: AsyncEngine, schema: str | None, *, writes: bool) -> str | None:
    """Return in words what the role lacks; None if it lacks nothing, or that can't be found out."""
    try:
        async with engine.connect() as connection:
            rows = (await connection.execute(_LACKING, {"schema": schema, "writes": writes})).all()
    except (SQLAlchemyError, OSError):
        return None  # there is another error to tell
    if not rows:
        return None
    [role, *_] = rows[0]
    grants = " ".join(grant for _, grant in rows)
    may = "intervene" if writes else "look at sagas"
    return f"the role {role} may not {may} (SQLSTATE 42501); have the owner of the tables run: {grants}"
