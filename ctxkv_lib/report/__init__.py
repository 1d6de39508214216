"""The written report, the comparison table, and `info` and `settings`, which need no run."""
