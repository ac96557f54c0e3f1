SELECT set_config('enable_seqscan', 'off', TRUE), set_config('enable_hashjoin', 'off', TRUE),
set_config('enable_mergejoin', 'off', TRUE), set_config('enable_material', 'off', TRUE)
