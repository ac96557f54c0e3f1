WITH
same AS MATERIALIZED (
    SELECT mark.id
    FROM
    unnest(CAST(CAST(%(saga_ids)b AS text) AS uuid[]), CAST(string_to_array(CAST(%(versions)b AS text), ',', '') AS bigint[]), CAST(string_to_array(CAST(%(entries)b AS text), ',', '') AS bigint[]),
        CAST(string_to_array(CAST(%(last_ids)b AS text), ',', '') AS bigint[])) AS mark (id, version, entries, last_id)
    CROSS JOIN LATERAL (
        SELECT count(*) AS entries, COALESCE(max(id), 0) AS last_id
        FROM saga_logs
        WHERE saga_id = mark.id
        OFFSET 0
    ) l
    WHERE l.entries = mark.entries AND l.last_id = mark.last_id
),
removed AS (
    DELETE FROM saga_logs l
    USING same s
    WHERE l.saga_id = s.id
),
stubs AS (
    UPDATE saga_executions e
    SET context = '{}', archived_at = a.archived_at, retain_until = NULL, lease_owner = NULL, lease_expires_at = NULL
    FROM same s, saga_archives a
    WHERE e.id = s.id AND a.id = CAST(CAST(%(archive_id)b AS text) AS uuid)
    RETURNING e.id
),
counted AS (
    UPDATE saga_archives SET removed = removed + (SELECT count(*) FROM stubs) WHERE id = CAST(CAST(%(archive_id)b AS text) AS uuid)
)
SELECT id FROM stubs
