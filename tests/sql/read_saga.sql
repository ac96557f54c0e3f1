SELECT
id, convert_to(name, 'UTF8'), convert_to(status, 'UTF8'), convert_to(CAST(context AS text), 'UTF8'),
CAST(version AS bigint), CAST(recovery_attempts AS bigint), convert_to(lease_owner, 'UTF8'),
timestamptz_send(lease_expires_at), timestamptz_send(created_at), timestamptz_send(updated_at)
, timestamptz_send(archived_at) FROM saga_executions WHERE id = %(saga_id)b
