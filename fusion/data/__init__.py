"""Task files -> rows -> token ids -> batches. Independent of models, Hydra and Lightning."""
