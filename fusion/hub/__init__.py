"""The Hugging Face Hub: reachability, tokenizers, custom code."""
