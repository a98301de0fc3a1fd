"""How well stored adapters may suit a target, before a fusion of them is trained."""
