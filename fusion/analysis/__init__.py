"""What adapters and fusions have learned: ablation, pruning, transferability scores."""
