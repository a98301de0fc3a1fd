"""AdapterFusion pipelines: train adapters on many tasks, then learn to combine them with AdapterFusion."""

from fusion.runs import signals

signals.exit_during_startup()  # before the other imports, which take a second

__version__ = "0.2.0.dev0"
