"""The HTML report about many runs. Reads files only."""
