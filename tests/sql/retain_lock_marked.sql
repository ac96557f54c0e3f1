SELECT e.id
FROM
unnest(CAST(CAST(%(saga_ids)b AS text) AS uuid[]), CAST(string_to_array(CAST(%(versions)b AS text), ',', '') AS bigint[]), CAST(string_to_array(CAST(%(entries)b AS text), ',', '') AS bigint[]),
    CAST(string_to_array(CAST(%(last_ids)b AS text), ',', '') AS bigint[])) AS mark (id, version, entries, last_id)
CROSS JOIN (SELECT archived_at FROM saga_archives WHERE id = CAST(CAST(%(archive_id)b AS text) AS uuid)) a
CROSS JOIN LATERAL (
    SELECT id
    FROM saga_executions
    WHERE id = mark.id AND version = mark.version AND archived_at IS NULL AND updated_at <= a.archived_at
    AND status IN ('COMPLETED', 'FAILED')
    AND (lease_owner IS NULL OR lease_expires_at <= statement_timestamp())
    AND (retain_until IS NULL OR retain_until <= statement_timestamp())
    FOR UPDATE SKIP LOCKED
) e
