SELECT convert_to(CAST(json_build_array(status, recovery_attempts, lease_owner, retain_until AT TIME ZONE 'UTC', archived_at AT TIME ZONE 'UTC', statement_timestamp() AT TIME ZONE 'UTC') AS text), 'UTF8') AS answer
FROM saga_executions
WHERE id = CAST(CAST(%(saga_id)b AS text) AS uuid)
FOR NO KEY UPDATE
