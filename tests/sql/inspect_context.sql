SELECT convert_to(CAST(json_build_array(archived, octet_length(text), CASE WHEN octet_length(text) <= CAST(%(most)b AS integer) THEN text END) AS text), 'UTF8') AS answer
FROM (
    SELECT json_build_array(archived_at AT TIME ZONE 'UTC') AS archived, CAST(context AS text) AS text
    FROM saga_executions
    WHERE id = CAST(CAST(%(saga_id)b AS text) AS uuid)
    OFFSET 0
) peeked
