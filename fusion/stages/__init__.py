"""The two stages, the search over learning rates and seeds, and the selection of a method."""
