"""Measurements of a finished run that are made on request."""
