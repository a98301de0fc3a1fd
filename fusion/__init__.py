"""AdapterFusion pipelines: train adapters on many tasks, then learn what to listen to."""

from fusion.runs import signals

signals.end_at_once_until_ready()  # first of all: what the commands import takes a second

__version__ = "0.2.0.dev0"
