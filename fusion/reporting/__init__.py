"""HTML report of many runs. Only files are read; no model is loaded."""
