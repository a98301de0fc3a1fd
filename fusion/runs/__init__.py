"""What a run is: identity, folder, status, sweep, provenance."""
