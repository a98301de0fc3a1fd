"""AdapterFusion pipelines: train adapters on many tasks, then learn what to listen to."""

__version__ = "0.2.0.dev0"
