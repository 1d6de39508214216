"""The model card of a run, which describes the model, how to load it, its settings and its results."""

from ..data.sources import SOURCES
from ..runs.summary import Run
from .document import markdown
from .tables import RESULTS, SETTINGS, side_by_side

TEXT = """---
license: {license}
library_name: transformers
pipeline_tag: text-generation
tags: [context-kv-attention]
---

# Context-KV attention, {samples:,} conversations

A language model whose attention reads a few compressed context vectors instead of every past token's keys and
values. It was trained on very little text, to study the architecture; it is not meant for practical use.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
ids = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(ids[0]))
```

{settings}

{results}
"""


def model_card(run: Run) -> str:
    """Write the model card as Markdown, with metadata for the Hugging Face Hub at the top."""
    about = {"this run": {**run.summary, "config": run.config.to_dict()}}
    source = SOURCES.get(run.config.data.source)  # None for the user's own conversations
    return TEXT.format(
        license=source.license if source else "unknown",
        samples=run.summary["samples"],
        settings=markdown(side_by_side(about, SETTINGS)),
        results=markdown(side_by_side(about, RESULTS)),
    )
