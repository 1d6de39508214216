"""The published method and exact contexts: tensors in, tensors out.

Read `reference` first, which has every step in plain lines; then `model`, `windows`, `oacd`, `contexts`,
`caches`, `phase2` and `evaluation`. `losses` and `loop` are details, `config` and `memory` for looking up.
"""
