"""Tables and the written report of runs; `info` and `settings`, which need no run."""
