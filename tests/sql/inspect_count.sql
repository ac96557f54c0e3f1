SELECT convert_to(CAST(json_build_array(count(*), FALSE) AS text), 'UTF8') AS answer FROM ((
        SELECT id, name, status, version, recovery_attempts, lease_owner, lease_expires_at, created_at, updated_at, archived_at, retain_until,
        CASE WHEN NOT (status IN ('PENDING', 'RUNNING', 'COMPENSATING')) THEN 'finished'
        WHEN lease_expires_at > clock.at THEN 'held'
        WHEN recovery_attempts >= CAST(%(max_attempts)b AS integer) THEN 'exhausted'
        WHEN lease_expires_at IS NOT NULL THEN 'abandoned'
        ELSE 'active' END AS standing, 0 AS position
        FROM saga_executions CROSS JOIN (SELECT statement_timestamp() AS at) AS clock
        WHERE name = CAST(%(name)b AS text)
        ORDER BY created_at DESC, id DESC
        LIMIT 100001)) picked
