SELECT pg_advisory_xact_lock(hashtextextended(
        'archives of ' || CAST(CAST(CAST('saga_archives' AS regclass) AS oid) AS text), 0)) IS NULL
