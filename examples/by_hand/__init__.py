"""A saga without an engine: read ``runner.py``; docs/how-to/write-a-saga-by-hand.md explains it."""
