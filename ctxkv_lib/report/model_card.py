"""Write the model card: model, training data and results."""

from huggingface_hub import EvalResult, ModelCardData

from ..data.hub import ULTRACHAT
from ..data.settings import SOURCES
from ..method.windows import Window
from ..progress import counted
from ..runs.run_folder import Run
from .columns import Column
from .document import template
from .info import slots_in_words

ON_THE_HUB = {"ultrachat": ULTRACHAT[0]}


def model_card(run: Run) -> str:
    """Write Markdown after the Hub's own fields: licence, language, datasets and results."""
    summary, config = run.summary, run.config
    window = Window(config.model, summary["context_window"].get("offsets"))
    text = template("model_card", "en").render(
        summary=summary,
        config=config,
        copies=Column("", config=config).copies,
        window=window,
        slots=slots_in_words(window, config.model),
    )
    return f"---\n{_fields(run).to_yaml()}\n---\n\n{text}"


def _fields(run: Run) -> ModelCardData:
    """Collect the fields. All sources but the user's file are English and under the MIT licence."""
    source, phase2 = run.config.data.source, run.summary["phase2"]
    scores = {"validation": (phase2["val_ppl"], phase2["val_acc"])}
    if test := run.summary.get("test"):
        scores["test"] = (test["ppl"], test["acc"])
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=ON_THE_HUB.get(source, source),
            dataset_name=SOURCES[source],
            dataset_split=split,
            metric_type=metric,
            metric_name=f"{metric} per GPT-2 token",
            metric_value=round(value, 4),
        )
        for split, found in scores.items()
        for metric, value in zip(("perplexity", "accuracy"), found, strict=True)
    ]
    return ModelCardData(
        license="unknown" if source == "file" else "mit",
        language=None if source == "file" else "en",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["context-kv-attention"],
        datasets=[ON_THE_HUB[source]] if source in ON_THE_HUB else None,
        model_name=f"Context-KV attention, {counted(run.summary['samples'], ' conversations')}",
        eval_results=results,
    )
