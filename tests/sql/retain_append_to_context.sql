UPDATE saga_executions
SET context = to_json((context #>> '{}') || CAST(%(piece)b AS text))
WHERE id = CAST(CAST(%(saga_id)b AS text) AS uuid)
RETURNING id
