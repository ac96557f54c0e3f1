SELECT pg_sequence_last_value(CAST(pg_get_serial_sequence(CAST(CAST('saga_logs' AS regclass) AS text), 'id') AS regclass)),
EXISTS (SELECT FROM saga_logs WHERE id = ANY (CAST(string_to_array(CAST(%(entry_ids)b AS text), ',', '') AS bigint[])))
