"""Settings, run folders, stages, provenance, the published numbers, and ways to use trained runs."""
