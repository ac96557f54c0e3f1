SELECT id
FROM saga_archives
WHERE id = CAST(CAST(%(archive_id)b AS text) AS uuid) AND state = 'VERIFIED'
FOR NO KEY UPDATE
