"""Analysis of trained adapters and fusions: source ablation, pruning, transferability scores."""
