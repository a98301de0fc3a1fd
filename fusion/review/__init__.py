"""What a run shows: W&B and CSV. The only place that imports wandb."""
