SELECT convert_to(substr(CAST(context AS text), CAST(%(first)b AS integer), 4194304), 'UTF8')
FROM saga_executions
WHERE id = CAST(CAST(%(saga_id)b AS text) AS uuid)
