"""A service on FastAPI whose orders are sagas: two web processes, a recovery worker, and one PostgreSQL.

``python -m examples.service`` runs all of it. Read ``orders.py`` first, the saga's steps; ``wiring.py`` is what both
kinds of process are made of, ``web.py`` and ``worker.py`` are the processes, and ``outside.py`` stands for services of
others. docs/how-to/fastapi.md tells the rest.
"""
