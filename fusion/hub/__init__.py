"""The Hugging Face hub: reachability, tokenizers, custom code."""
