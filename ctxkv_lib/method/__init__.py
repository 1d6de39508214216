"""The published method, exact contexts, and what recipe `tuned` has instead: tensors in, tensors out.

Read `reference` first, which has every step in plain lines; then `model`, `windows`, `oacd`, `contexts`,
`caches`, `phase2`, `scoring`; `tuned`, `copying`, `optimizer`; `modeling`. The rest are details.
"""
