INSERT INTO saga_shard (cluster, shard, shards, hash)
VALUES (CAST(CAST(%(cluster)b AS text) AS uuid), CAST(%(shard)b AS integer), CAST(%(shards)b AS integer), CAST(%(hash)b AS text))
ON CONFLICT DO NOTHING
RETURNING shard
