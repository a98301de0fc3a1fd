"""Typed settings with validation, one file per topic."""
