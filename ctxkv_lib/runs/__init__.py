"""The run folder, what a result came from, the published numbers, and trained runs in use."""
