SELECT given.id,
CAST(l.id AS bigint), convert_to(l.step_name, 'UTF8'), convert_to(l.action, 'UTF8'), convert_to(l.status, 'UTF8'),
convert_to(l.details, 'UTF8'), timestamptz_send(l.created_at)
FROM unnest(CAST(CAST(%(saga_ids)b AS text) AS uuid[])) WITH ORDINALITY AS given (id, position)
CROSS JOIN LATERAL (SELECT * FROM saga_logs WHERE saga_id = given.id ORDER BY id OFFSET 0) l
ORDER BY given.position, l.id
