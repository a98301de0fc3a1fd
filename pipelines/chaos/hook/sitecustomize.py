"""Python runs this first in a process that has this folder in its PYTHONPATH: how a victim gets its fate."""

from pipelines.chaos.fate import install

install()
