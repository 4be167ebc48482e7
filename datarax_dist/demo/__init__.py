"""The demo: a job of four hosts is killed in the middle of a save, goes on, and proves it.

Run it with ``python -m datarax_dist.demo --out DIR``.
"""
