SELECT set_config('transaction_read_only', 'on', TRUE), set_config('statement_timeout', '5s', TRUE),
set_config('plan_cache_mode', 'force_custom_plan', TRUE)
