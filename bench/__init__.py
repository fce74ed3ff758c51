"""Measurements. Each module runs with `python -m bench.NAME` and prints a table, then one JSON object as its last line."""
