"""Tables and written reports of runs, and the output of `info` and `settings`, which need no run."""
