"""Run folders and stages, provenance, the published numbers, and the use of trained runs."""
