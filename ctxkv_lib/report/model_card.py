"""The model card: what a saved model is, what it was trained on and how well it does."""

from ..method.windows import Window
from ..runs.run_folder import Run
from .document import template
from .info import slots_in_words


def model_card(run: Run) -> str:
    """Write Markdown with the front matter that the Hub reads."""
    summary, config = run.summary, run.config
    words = template("model_card", "en")
    return words.render(
        summary=summary,
        phase2=summary["phase2"],
        made=summary["provenance"],
        config=config,
        model=config.model,
        window=slots_in_words(Window(config.model, summary["context_window"].get("offsets")), config.model),
    )
