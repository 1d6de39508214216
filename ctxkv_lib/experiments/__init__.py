"""Whole runs: the stages in order, comparisons, sweeps."""
