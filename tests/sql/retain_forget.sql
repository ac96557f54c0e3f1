DELETE FROM saga_executions
WHERE id = ANY (CAST(CAST(%(saga_ids)b AS text) AS uuid[]))
AND archived_at <= statement_timestamp() - make_interval(secs => CAST(%(older_than)b AS double precision))
RETURNING id
