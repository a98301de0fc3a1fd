"""AdapterFusion pipelines: train adapters on many tasks, then learn what to listen to."""

from fusion.runs import signals

signals.exit_during_startup()  # first of all: imports take a second

__version__ = "0.2.0.dev0"
