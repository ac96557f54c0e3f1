SELECT
CAST(l.id AS bigint), convert_to(l.step_name, 'UTF8'), convert_to(l.action, 'UTF8'), convert_to(l.status, 'UTF8'),
convert_to(l.details, 'UTF8'), timestamptz_send(l.created_at)
FROM (
    SELECT *, sum(octet_length(COALESCE(details, ''))) OVER (ORDER BY id)
    - octet_length(COALESCE(details, '')) AS before
    FROM (
        SELECT *
        FROM saga_logs
        WHERE saga_id = CAST(CAST(%(saga_id)b AS text) AS uuid) AND id > CAST(%(after)b AS bigint)
        ORDER BY id
        LIMIT 1000
    ) page
) l
WHERE before < 4194304
ORDER BY l.id
