"""Whole runs: the stages in order, comparisons, proposals."""
