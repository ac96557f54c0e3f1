SELECT convert_to(CAST(json_build_array(l.step_name, l.action, (
                SELECT max(later.id) FROM saga_logs later
                WHERE later.saga_id = l.saga_id AND later.id > l.id
                AND later.step_name = l.step_name AND later.action = l.action
        )) AS text), 'UTF8') AS answer
FROM saga_logs l
WHERE l.saga_id = CAST(CAST(%(saga_id)b AS text) AS uuid) AND l.id = CAST(%(entry_id)b AS bigint) AND l.status = 'STARTED'
AND NOT EXISTS (
    SELECT FROM saga_logs later
    WHERE later.saga_id = l.saga_id AND later.id > l.id AND later.status <> 'STARTED'
    AND later.step_name = l.step_name AND later.action = l.action
)
