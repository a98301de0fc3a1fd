"""W&B and CSV tracking. The only package that imports wandb."""
