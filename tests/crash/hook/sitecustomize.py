"""Python imports this at startup if the folder is in PYTHONPATH, also in every rank."""

from tests.crash.faults import install

install()
