"""The published method, exact contexts, and the parts of recipe `tuned`, which work on tensors.

Read `reference` first: it writes out every step in plain code. Continue with `model`, `windows`, `oacd`,
`contexts`, `caches`, `phase2` and `scoring`; then `tuned`, `copying` and `optimizer`; and `modeling` last.
The other modules hold details.
"""
