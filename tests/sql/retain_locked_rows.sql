SELECT e.id, convert_to(e.name, 'UTF8'), CAST(e.version AS bigint), timestamptz_send(e.created_at),
e.archived_at IS NOT NULL, (SELECT count(*) FROM saga_logs WHERE saga_id = e.id),
CAST(octet_length(CAST(e.context AS text)) AS bigint),
(SELECT id FROM saga_archives WHERE archived_at = e.archived_at)
FROM saga_executions e
WHERE e.id = ANY (CAST(CAST(%(saga_ids)b AS text) AS uuid[]))
