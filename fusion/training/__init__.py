"""Training with Lightning: the module, metrics, callbacks, and the `fit` function."""
