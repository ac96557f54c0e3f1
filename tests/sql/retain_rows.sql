SELECT
e.id, convert_to(e.name, 'UTF8'), convert_to(e.status, 'UTF8'), CAST(e.version AS bigint),
CAST(e.recovery_attempts AS bigint), timestamptz_send(e.created_at), timestamptz_send(e.updated_at), CASE WHEN octet_length(CAST(e.context AS text)) <= 262144
THEN convert_to(CAST(e.context AS text), 'UTF8') END
FROM unnest(CAST(CAST(%(saga_ids)b AS text) AS uuid[])) WITH ORDINALITY AS given (id, position)
CROSS JOIN LATERAL (SELECT * FROM saga_executions WHERE id = given.id LIMIT 1) e
ORDER BY given.position
