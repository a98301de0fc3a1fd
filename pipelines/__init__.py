"""Whole workflows of this project's commands: each is a program, run from a checkout."""

import fusion  # noqa: F401  # sets handlers for signals before the larger imports
