"""Python imports this at its start wherever this folder is in PYTHONPATH, in every rank as well."""

from tests.crash.faults import install

install()
