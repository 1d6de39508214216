"""The model card: what a saved model is, what it was trained on and how well it does."""

from ..runs.run_folder import Run
from .info import slots_in_words
from .tables import literal

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- context-kv-attention
---

# Context-KV attention, {samples} conversations

A language model whose attention reads {max_contexts} compressed context vectors instead of every past
token's keys and values. Trained with `ctxkv_lib`, preset `{preset}`, recipe `{recipe}`.

| | |
|---|---|
| Validation perplexity (per GPT-2 token) | {val_ppl:.1f} |
| Validation accuracy | {val_acc:.1%} |
| Training perplexity at the best epoch ({best_epoch} of {epochs}) | {train_ppl:.1f} |
| Contexts | {contexts}, effective rank {effective_rank:.1%} |
| Parameters | {total:,}, of which Phase 2 trained {trainable:,} |
| Context window | {window} |
| Slots | anchor {anchor}, {kv_method} count |
| Training data | {source}: {samples} conversations, {train_tokens:,} tokens |
| Token table, frozen and tied to the output | {table} |
| Trained on | {device}, {precision} products, {date}, commit {commit} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
ids = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(ids[0]))
```

`trust_remote_code=True` is not needed where `ctxkv_lib.model.modeling` has been imported. The model has seen
very little text: it is for studying the architecture, not for use.
"""


def model_card(run: Run) -> str:
    """Markdown with the front matter that the Hub reads."""
    summary, config = run.summary, run.config
    phase2, made = summary["phase2"], summary["provenance"]
    return CARD.format(
        samples=summary["samples"],
        preset=config.preset,
        recipe=config.recipe,
        **{name: phase2[name] for name in ("val_ppl", "val_acc", "train_ppl", "best_epoch")},
        epochs=len(phase2["epochs"]),
        contexts=summary["phase1"]["contexts"],
        effective_rank=summary["phase1"]["effective_rank"],
        total=summary["parameters"]["total"],
        trainable=summary["parameters"]["trainable_phase2"],
        max_contexts=config.model.max_contexts,
        window=slots_in_words(config.model),
        anchor=config.model.anchor,
        kv_method=config.model.kv_method,
        source=made["data"]["source"],
        train_tokens=summary["train_tokens"],
        table=made["embeddings"]["table"],
        device=literal(made["device"]),
        precision=made["precision"],
        date=made["date"],
        commit=made["git_commit"] or "unknown",
    )
