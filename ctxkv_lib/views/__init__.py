"""Figures of runs, live curves, explorers, and what notebooks share."""
