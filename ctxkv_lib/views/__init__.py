"""Figures, live curves and explorers of runs, and the form that configures a run in a notebook."""
