"""The only door between stage 1 and stage 2: artifacts on disk, weights and manifest."""
