SELECT has_table_privilege(CAST('saga_archives' AS regclass), 'SELECT')
