SELECT forgotten
FROM saga_store_forget_stubs(CAST(CAST(%(saga_ids)b AS text) AS uuid[]), CAST(%(older_than)b AS double precision)) AS forgotten
