SELECT CAST(l.pid AS bigint), convert_to(COALESCE(a.application_name, ''), 'UTF8')
FROM pg_locks l
LEFT JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
AND (CAST(CAST(l.classid AS bigint) AS bit(64)) << 32 | CAST(CAST(l.objid AS bigint) AS bit(64)))
= CAST(hashtextextended('archiver of ' || CAST(CAST(CAST('saga_archives' AS regclass) AS oid) AS text), 0) AS bit(64))
