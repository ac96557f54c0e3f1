"""An order saga that survives SIGKILL: run it with ``make demo``.

Read ``saga.py`` first: the steps of an order, as an application would write them. ``shop.py`` is the world
that they change, ``worker.py`` the process that runs them, and ``__main__.py`` tells the story.
"""
