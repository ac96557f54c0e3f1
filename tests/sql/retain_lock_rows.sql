SELECT id
FROM saga_executions
WHERE id = ANY (CAST(CAST(%(saga_ids)b AS text) AS uuid[]))
ORDER BY id
FOR NO KEY UPDATE
