"""Figures of runs, live curves, explorers, and the form of notebooks."""
