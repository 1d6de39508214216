"""Figures of runs, live curves, explorers, and the configuration form of notebooks."""
