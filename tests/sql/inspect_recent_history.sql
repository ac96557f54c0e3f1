(SELECT convert_to(CAST(json_build_array((SELECT json_build_array(archived_at AT TIME ZONE 'UTC') FROM saga_executions WHERE id = CAST(CAST(%(saga_id)b AS text) AS uuid)), (SELECT count(*) FROM saga_logs WHERE saga_id = CAST(CAST(%(saga_id)b AS text) AS uuid) AND id > CAST(%(after)b AS bigint))) AS text), 'UTF8') AS answer)
UNION ALL
(SELECT convert_to(CAST(json_build_array(json_build_array(l.id, l.step_name, l.action, l.status, CASE WHEN length(l.details) > 2000 THEN json_build_array(left(l.details, 1000), right(l.details, 1000)) ELSE to_json(l.details) END, l.created_at AT TIME ZONE 'UTC')) AS text), 'UTF8')
    FROM (
        SELECT *
        FROM saga_logs
        WHERE saga_id = CAST(CAST(%(saga_id)b AS text) AS uuid) AND id > CAST(%(after)b AS bigint)
        ORDER BY id DESC
        LIMIT %(limit)b
    ) l
    ORDER BY l.id)
