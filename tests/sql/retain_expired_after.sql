WITH
seen AS MATERIALIZED (
    SELECT id, name, status, version, created_at, updated_at,
    CASE WHEN status IN ('COMPLETED', 'FAILED') AND archived_at IS NULL AND isfinite(updated_at)
    AND (retain_until IS NULL OR retain_until <= clock.at)
    AND (lease_owner IS NULL OR lease_expires_at <= clock.at)
    THEN CAST(EXTRACT(EPOCH FROM clock.at - updated_at) AS double precision) - (
        CASE WHEN name = ANY (CAST(%(names)b AS text[])) THEN (
            SELECT term.seconds
            FROM unnest(CAST(%(names)b AS text[]), CAST(string_to_array(CAST(%(terms)b AS text), ',', '') AS double precision[])) AS term (name, seconds)
            WHERE term.name = saga_executions.name)
        WHEN status = 'COMPLETED' THEN CAST(%(completed)b AS double precision)
        ELSE CAST(%(failed)b AS double precision) END) END AS overdue
    FROM saga_executions CROSS JOIN (SELECT statement_timestamp() AS at) AS clock
    WHERE isfinite(created_at) AND (created_at, id) > (CAST(CAST(%(after_created_at)b AS text) AS timestamp) AT TIME ZONE 'UTC', CAST(CAST(%(after_id)b AS text) AS uuid))
    AND created_at <= statement_timestamp() - make_interval(secs => CAST(%(least)b AS double precision))
    ORDER BY created_at, id
    LIMIT 20000
),
expired AS MATERIALIZED (
    SELECT *
    FROM seen
    WHERE overdue >= 0
    ORDER BY created_at, id
    LIMIT %(limit)b
)
(SELECT convert_to(CAST(json_build_array(count(*), (SELECT json_build_array(created_at AT TIME ZONE 'UTC', id) FROM seen ORDER BY created_at DESC, id DESC LIMIT 1)) AS text), 'UTF8') AS answer
    FROM seen)
UNION ALL
(SELECT convert_to(CAST(json_build_array(e.id, e.version, l.entries, l.last_id, e.name, e.status, e.created_at AT TIME ZONE 'UTC', e.updated_at AT TIME ZONE 'UTC', l.size + c.size, e.overdue) AS text), 'UTF8')
    FROM expired e
    CROSS JOIN LATERAL (
        SELECT count(*) AS entries, COALESCE(max(id), 0) AS last_id, COALESCE(sum(octet_length(details)), 0) AS size
        FROM saga_logs
        WHERE saga_id = e.id
        OFFSET 0
    ) l
    CROSS JOIN LATERAL (
        SELECT octet_length(CAST(context AS text)) AS size
        FROM saga_executions
        WHERE id = e.id
        LIMIT 1
    ) c
    ORDER BY e.created_at, e.id)
