SELECT id, CAST(version AS bigint), convert_to(CAST(recent_writes AS text), 'UTF8'), timestamptz_send(archived_at)
FROM saga_executions
WHERE id = ANY (CAST(CAST(%(saga_ids)b AS text) AS uuid[]))
