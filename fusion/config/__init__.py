"""Typed settings, one file per topic, with the checks of their values."""
