SELECT e.id
FROM unnest(CAST(CAST(%(saga_ids)b AS text) AS uuid[])) WITH ORDINALITY AS given (id, position)
CROSS JOIN LATERAL (SELECT id, archived_at FROM saga_executions WHERE id = given.id LIMIT 1) e
WHERE e.archived_at = (SELECT archived_at FROM saga_archives WHERE id = CAST(CAST(%(archive_id)b AS text) AS uuid))
