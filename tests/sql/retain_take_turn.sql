SELECT pg_try_advisory_xact_lock(hashtextextended('archiver of ' || CAST(CAST(CAST('saga_archives' AS regclass) AS oid) AS text), 0)),
set_config('idle_in_transaction_session_timeout', '0', TRUE) IS NULL
