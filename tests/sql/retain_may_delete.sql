SELECT has_table_privilege(CAST('saga_logs' AS regclass), 'DELETE')
