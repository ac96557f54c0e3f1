SELECT id, status IN ('PENDING', 'RUNNING', 'COMPENSATING') AS is_unfinished
FROM saga_executions
WHERE id = ANY (CAST(CAST(%(saga_ids)b AS text) AS uuid[]))
