"""What can stand in a slot, and the heads: pure torch, plain numbers in, no config."""
