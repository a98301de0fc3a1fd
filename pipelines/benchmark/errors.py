"""How a suite ends when it cannot go on."""


class BenchmarkError(Exception):
    """One line that names the log which says more: exit code 1."""
