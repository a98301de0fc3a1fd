"""Task files -> examples -> token ids -> batches. Independent of models, Hydra and Lightning."""
