"""Every method of the project once on one target, with the same budget, in one table.

`rows.py` is the list of methods; a new one is a new line there.
"""
