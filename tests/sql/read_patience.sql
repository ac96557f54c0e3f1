SELECT CAST(setting AS bigint)
FROM pg_settings
WHERE name IN ('lock_timeout', 'statement_timeout')
ORDER BY name
