SELECT convert_to(status, 'UTF8'), CAST(recovery_attempts AS bigint), convert_to(lease_owner, 'UTF8'),
CAST(version AS bigint), timestamptz_send(archived_at)
FROM saga_executions
WHERE id = %(saga_id)b
