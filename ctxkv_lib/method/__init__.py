"""The published method, exact contexts, and what recipe `tuned` has instead: tensors in, tensors out.

Read `reference` first, which has every step in plain lines; then `model`, `windows`, `oacd`, `contexts`,
`caches`, `phase2` and `evaluation`; for recipe `tuned` also `tuned`, `copying` and `optimizer`; for
transformers `modeling`. `losses` and `loop` are details, `config` and `memory` for looking up.
"""
