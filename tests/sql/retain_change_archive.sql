WITH
a AS (
    UPDATE saga_archives
    SET state = CAST(%(state)b AS text),
    archived_at = CASE WHEN CAST(%(state)b AS text) = 'VERIFIED' THEN clock.next ELSE archived_at END,
    removed_at = CASE WHEN CAST(%(state)b AS text) = 'REMOVED' THEN clock.at ELSE removed_at END,
    sha256 = COALESCE(CAST(%(sha256)b AS text), sha256),
    sagas = COALESCE(CAST(%(sagas)b AS bigint), sagas),
    entries = COALESCE(CAST(%(entries)b AS bigint), entries),
    bytes = COALESCE(CAST(%(bytes)b AS bigint), bytes),
    watermark = COALESCE(CAST(%(watermark)b AS text), watermark),
    error = COALESCE(CAST(%(error)b AS text), error)
    FROM (
        SELECT clock_timestamp() AS at,
        GREATEST(clock_timestamp(), max(archived_at) + interval '1 microsecond') AS next
        FROM saga_archives
    ) AS clock
    WHERE id = CAST(CAST(%(archive_id)b AS text) AS uuid) AND state = ANY (string_to_array(CAST(%(states)b AS text), ','))
    RETURNING saga_archives.*
)
SELECT convert_to(CAST(json_build_array(a.id, a.uri, a.state, a.archived_by, a.begun_at AT TIME ZONE 'UTC', a.archived_at AT TIME ZONE 'UTC', a.removed_at AT TIME ZONE 'UTC', a.sha256, a.sagas, a.entries, a.bytes, a.removed, a.watermark, a.error) AS text), 'UTF8') AS answer FROM a
