SELECT convert_to(CAST(json_build_array(a.id, a.uri, a.state, a.archived_by, a.begun_at AT TIME ZONE 'UTC', a.archived_at AT TIME ZONE 'UTC', a.removed_at AT TIME ZONE 'UTC', a.sha256, a.sagas, a.entries, a.bytes, a.removed, a.watermark, a.error) AS text), 'UTF8') AS answer
FROM saga_archives a
WHERE (CAST(%(states)b AS text) IS NULL OR state = ANY (string_to_array(CAST(%(states)b AS text), ',')))
ORDER BY begun_at DESC, id DESC
LIMIT %(limit)b
