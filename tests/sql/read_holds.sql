SELECT lease_owner = CAST(%(owner)b AS text) AND version = %(version)b AND lease_expires_at > statement_timestamp() AS held
FROM saga_executions
WHERE id = %(saga_id)b
