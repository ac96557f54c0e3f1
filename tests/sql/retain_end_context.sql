UPDATE saga_executions
SET context = CAST((context #>> '{}') AS json)
WHERE id = CAST(CAST(%(saga_id)b AS text) AS uuid)
RETURNING id
