"""The published method, the exact computation of contexts, and the parts of recipe `tuned`.

Read `reference` first: it spells out every step in plain code. Then read `model`, `windows`, `oacd`,
`contexts`, `streams`, `phase2` and `scoring`. After that, read `tuned`, `copying` and `optimizer`, and
`modeling` last. The other modules contain details.
"""
