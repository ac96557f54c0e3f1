SELECT convert_to(CAST(json_build_array(json_build_array(archived_at AT TIME ZONE 'UTC'), status, recovery_attempts, lease_owner, version) AS text), 'UTF8') AS answer
FROM saga_executions
WHERE id = CAST(CAST(%(saga_id)b AS text) AS uuid)
FOR NO KEY UPDATE
