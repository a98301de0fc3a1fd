"""Lightning: the module, the metrics, the callbacks, and one call that fits."""
