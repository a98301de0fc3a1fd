"""Comparison of all methods on one target with the same training budget. The methods are listed in `rows.py`."""
