"""Breaks PostgreSQL, its connections and its clients while these write sagas, and checks what became of every write.

``python -m tests.crash --help``. Clients (``client``, ``workload``) write through real storages and keep a ``journal``
of what they asked and what they were told. ``bed`` holds the servers (``site``) and the processes (``processes``),
``faults`` breaks things, ``tables`` reads what was stored, ``checker`` compares, ``report`` prints. Of several servers
each is a shard of one storage.
"""
