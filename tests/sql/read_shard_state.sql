SELECT convert_to(CAST(r.cluster AS text), 'UTF8'), CAST(r.shard AS bigint), CAST(r.shards AS bigint),
convert_to(r.hash, 'UTF8'), NOT EXISTS (SELECT FROM saga_executions) AS is_empty,
convert_to(
    concat_ws(
        ' ', (SELECT system_identifier FROM pg_control_system()),
        (SELECT oid FROM pg_database WHERE datname = current_database()),
        CAST(CAST('saga_executions' AS regclass) AS oid)
    ), 'UTF8'
) AS place
FROM (SELECT) one
LEFT JOIN saga_shard r ON TRUE
