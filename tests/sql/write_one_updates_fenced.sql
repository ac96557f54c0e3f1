UPDATE saga_executions e
SET status = COALESCE(CAST(NULL AS text), e.status),
context = COALESCE(i.context, e.context),
recovery_attempts = COALESCE(CAST(NULL AS integer), e.recovery_attempts),
lease_owner = CASE WHEN CAST(NULL AS text) IN ('COMPLETED', 'FAILED') OR CAST(NULL AS boolean) THEN NULL
ELSE COALESCE(CAST(NULL AS text), e.lease_owner) END,
lease_expires_at = CASE WHEN CAST(NULL AS text) IN ('COMPLETED', 'FAILED') OR CAST(NULL AS boolean)
OR COALESCE(CAST(NULL AS text), e.lease_owner) IS NULL THEN NULL
ELSE COALESCE(i.ends, e.lease_expires_at) END,
recent_writes = CASE
WHEN i.write_id IS NULL THEN e.recent_writes
WHEN (CAST(NULL AS text) IS NOT NULL OR i.context IS NOT NULL OR CAST(NULL AS integer) IS NOT NULL OR CAST(NULL AS text) IS NOT NULL OR COALESCE(CAST(NULL AS boolean), FALSE)) THEN
e.recent_writes[GREATEST(cardinality(e.recent_writes) - 8 + 2, 1):] || i.write_id
WHEN (cardinality(e.recent_writes) < 32) IS NOT FALSE
THEN e.recent_writes || i.write_id
WHEN e.recent_writes[1] >> 48 = e.version & 32767 THEN e.recent_writes
ELSE e.recent_writes[2:] || i.write_id END,
version = e.version + CAST((CAST(NULL AS text) IS NOT NULL OR i.context IS NOT NULL OR CAST(NULL AS integer) IS NOT NULL OR CAST(NULL AS text) IS NOT NULL OR COALESCE(CAST(NULL AS boolean), FALSE)) AS integer),
updated_at = CASE WHEN (CAST(NULL AS text) IS NOT NULL OR i.context IS NOT NULL OR CAST(NULL AS integer) IS NOT NULL OR CAST(NULL AS text) IS NOT NULL OR COALESCE(CAST(NULL AS boolean), FALSE)) THEN i.at ELSE e.updated_at END
FROM (SELECT CAST(CAST(%(context)b AS text) AS json) AS context, CAST(%(write_id)b AS bigint) AS write_id, statement_timestamp() AS at, statement_timestamp() + make_interval(secs => CAST(NULL AS double precision)) AS ends) AS i WHERE e.id = (
    SELECT id
    FROM saga_executions WHERE id = %(saga_id)b AND archived_at IS NULL AND (CAST(%(expected)b AS bigint) IS NULL OR CAST(%(expected)b AS bigint) = version) AND NOT COALESCE(CAST(%(write_id)b AS bigint) = ANY (recent_writes), FALSE)
    FOR NO KEY UPDATE SKIP LOCKED)
RETURNING e.id, CAST(e.version AS bigint) AS version
