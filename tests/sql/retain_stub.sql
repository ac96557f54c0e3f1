SELECT convert_to(CAST(json_build_array(e.name, e.status, e.version, e.created_at AT TIME ZONE 'UTC', e.archived_at AT TIME ZONE 'UTC', a.id) AS text), 'UTF8') AS answer
FROM saga_executions e
LEFT JOIN saga_archives a ON a.archived_at = e.archived_at
WHERE e.id = CAST(CAST(%(saga_id)b AS text) AS uuid) AND e.archived_at IS NOT NULL
