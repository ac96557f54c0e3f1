SELECT made
FROM saga_store_make_stubs(CAST(CAST(%(archive_id)b AS text) AS uuid), CAST(CAST(%(saga_ids)b AS text) AS uuid[]), CAST(string_to_array(CAST(%(versions)b AS text), ',', '') AS bigint[]),
    CAST(string_to_array(CAST(%(entries)b AS text), ',', '') AS bigint[]), CAST(string_to_array(CAST(%(last_ids)b AS text), ',', '') AS bigint[])) AS made
