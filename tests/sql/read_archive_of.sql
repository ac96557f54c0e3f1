SELECT convert_to(a.uri, 'UTF8')
FROM saga_executions e
JOIN saga_archives a ON a.archived_at = e.archived_at
WHERE e.id = %(saga_id)b
