"""How fast the storage is, beside others that do the same work on the same server at the same time: ``make bench``.

``python -m benchmarks --help`` tells what can be chosen; docs/performance.md tells what is measured, and how.
"""
