"""Every method of the project once on one target, with the same budget, in one table. `rows.py` lists the methods."""
