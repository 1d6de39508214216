"""Figures of runs, live curves, explorers, and the configuration from a notebook's form."""
