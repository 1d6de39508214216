"""Tables and reports of runs, and the output of `ctxkv info` and `ctxkv settings`, which need no run."""
