SELECT
id, convert_to(name, 'UTF8'), convert_to(status, 'UTF8'), convert_to(CAST(context AS text), 'UTF8'),
CAST(version AS bigint), CAST(recovery_attempts AS bigint), convert_to(lease_owner, 'UTF8'),
timestamptz_send(lease_expires_at), timestamptz_send(created_at), timestamptz_send(updated_at)
FROM saga_executions
WHERE status IN ('PENDING', 'RUNNING', 'COMPENSATING')
AND recovery_attempts >= %(max_attempts)b
AND (lease_expires_at IS NULL OR lease_expires_at <= statement_timestamp())
AND (CAST(%(name)b AS text) IS NULL OR name = CAST(%(name)b AS text))
ORDER BY updated_at, id
LIMIT %(limit)b
