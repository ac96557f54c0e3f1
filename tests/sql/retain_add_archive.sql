WITH
a AS (
    INSERT INTO saga_archives (id, uri, state, archived_by, begun_at)
    VALUES (CAST(CAST(%(archive_id)b AS text) AS uuid), CAST(%(uri)b AS text), 'WRITING', CAST(%(archived_by)b AS text), statement_timestamp())
    ON CONFLICT (id) DO NOTHING
    RETURNING *
)
SELECT convert_to(CAST(json_build_array(a.id, a.uri, a.state, a.archived_by, a.begun_at AT TIME ZONE 'UTC', a.archived_at AT TIME ZONE 'UTC', a.removed_at AT TIME ZONE 'UTC', a.sha256, a.sagas, a.entries, a.bytes, a.removed, a.watermark, a.error) AS text), 'UTF8') AS answer FROM a
