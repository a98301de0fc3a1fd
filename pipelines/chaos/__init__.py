"""Kills real runs at random places and starts them again, until it is shown that nothing is lost.

Nothing is imported here: every victim reads this package before anything else.
"""
