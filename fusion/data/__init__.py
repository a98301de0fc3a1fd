"""Task files -> rows -> token ids -> batches. Knows no model, no Hydra and no Lightning."""
