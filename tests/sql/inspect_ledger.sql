SELECT convert_to(CAST(json_build_array(COALESCE(sum(removed), 0), COALESCE(sum(bytes) FILTER (WHERE state <> 'FAILED'), 0), count(*) FILTER (WHERE state = 'FAILED' AND begun_at >= statement_timestamp() - make_interval(secs => CAST(%(window)b AS double precision))), max(archived_at) AT TIME ZONE 'UTC') AS text), 'UTF8') AS answer
FROM saga_archives
