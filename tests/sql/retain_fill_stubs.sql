UPDATE saga_executions e
SET status = record.status, context = CAST(record.context AS json), recovery_attempts = record.attempts,
updated_at = record.updated_at AT TIME ZONE 'UTC', archived_at = NULL, retain_until = CASE WHEN CAST(%(keep_for)b AS double precision) > 0 THEN keep.until END
FROM
unnest(CAST(CAST(%(saga_ids)b AS text) AS uuid[]), CAST(%(names)b AS text[]), CAST(string_to_array(CAST(%(statuses)b AS text), ',', '') AS text[]),
    CAST(%(contexts)b AS text[]), CAST(string_to_array(CAST(%(versions)b AS text), ',', '') AS integer[]), CAST(string_to_array(CAST(%(attempts)b AS text), ',', '') AS integer[]),
    CAST(string_to_array(CAST(%(created)b AS text), ',', '') AS timestamp[]), CAST(string_to_array(CAST(%(updated)b AS text), ',', '') AS timestamp[]))
AS record (id, name, status, context, version, attempts, created_at, updated_at)
CROSS JOIN (
    SELECT statement_timestamp() + make_interval(secs => CAST(%(keep_for)b AS double precision)) AS until) AS keep
WHERE e.id = record.id
RETURNING e.id
