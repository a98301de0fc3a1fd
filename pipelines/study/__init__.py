"""Study of fusion and its baselines on many targets with few labels, see `config.py`."""
