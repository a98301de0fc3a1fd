"""Whole journeys, made of the commands alone: each is a program of its own, run from a checkout."""

import fusion  # noqa: F401  # sets handlers for signals before the larger imports
