SELECT
CAST(l.id AS bigint), convert_to(l.step_name, 'UTF8'), convert_to(l.action, 'UTF8'), convert_to(l.status, 'UTF8'),
convert_to(l.details, 'UTF8'), timestamptz_send(l.created_at)
, timestamptz_send(archived_at)
FROM saga_executions e
LEFT JOIN saga_logs l ON l.saga_id = e.id AND l.status = 'STARTED' AND NOT EXISTS (
    SELECT FROM saga_logs later
    WHERE later.saga_id = l.saga_id AND later.id > l.id AND later.status <> 'STARTED'
    AND later.step_name = l.step_name AND later.action = l.action
)
WHERE e.id = %(saga_id)b
ORDER BY l.id
