"""The inputs of an experiment: its texts, tokens, token table and model, and their digests."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.config import Split
from ..data.conversations import Conversations, load_conversations
from ..data.token_table import TokenTable, load_table, table_fingerprint
from ..data.tokens import load_tokenizer, tokenizer_digest, train_stream, validation_stream
from ..errors import UserError
from ..files import PACKAGE, source_digest
from ..method.model import ContextKV
from ..plugins.checks import try_plugins
from ..plugins.hooks import HOOKS
from ..progress import status_line
from .build import frozen_model, log_frequencies
from .config import ExperimentConfig
from .records import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Modules of the packages `method` and `data` that do not affect results: the reference implementation, memory
# snapshots, and code that only saved models use. All other modules of both packages affect results.
NOT_IN_RESULTS = {
    "method.reference",
    "method.memory",
    "method.modeling",
    "method.own_code",
    "method.arguments",
}
ALSO_IN_RESULTS = {"runs.build", "runs.inputs", "runs.stages", "runs.training"}
IN_SAVED_MODELS = {"method.modeling", "method.own_code", "method.arguments", "runs.export"}


def result_code() -> str:
    """Return a digest of the code that computes results, ignoring docstrings, comments and layout."""
    computing = {
        f"{folder}.{file.stem}" for folder in ("method", "data") for file in (PACKAGE / folder).glob("*.py")
    }
    return source_digest(*sorted((computing - NOT_IN_RESULTS) | ALSO_IN_RESULTS))


def settings_table(config: ExperimentConfig, *names: str) -> Table:
    """Return the settings for a stage's table. Each of `names` is a group, a hook, or a single setting.

    If a hook has no plug-in, `HOOK.plugin` is None. The digest of a plug-in's code is named `code of HOOK`.
    """
    settings: Table = {f"{hook}.plugin": None for hook in HOOKS} | config.flat()
    chosen = {name: value for name, value in settings.items() if {name, name.partition(".")[0]} & {*names}}
    codes = {f"{hook}.code": f"code of {hook}" for hook in HOOKS}
    return {codes.get(name, name): value for name, value in chosen.items()}


class Inputs:
    """The inputs of an experiment. Tokens, token table and model are read or built when they are needed.

    Args:
        texts: the conversations of each split, from `read_splits`.
        precision: dtype of Phase 2's matrix products, "fp32" or "bf16".
    """

    def __init__(
        self, config: ExperimentConfig, texts: dict[str, Conversations], device: torch.device, precision: str
    ) -> None:
        self.config, self.texts, self.device, self.precision = config, texts, device, precision

    @cached_property
    @status_line("Reading the token table")
    def token_table(self) -> TokenTable:
        config, corpus = self.config, self.texts.get("corpus")
        return load_table(config.data, config.model.hidden_size, config.runtime.seed, corpus)

    @cached_property
    @status_line("Reading the tokenizer")
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        return load_tokenizer(self.config.data.tokenizer)

    @cached_property
    def ids(self) -> dict[str, Tensor]:
        """Token ids of both streams, "train" and "val", on the CPU.

        Raises:
            UserError: A stream is too short: it must have more tokens than one context window.
        """
        ids = {
            "train": train_stream(self.texts["train"], self.tokenizer).ids,
            "val": validation_stream(self.texts["validation"], self.tokenizer).ids,
        }
        has_contexts = self.config.reads == "contexts"
        window = self.config.model.context_window if has_contexts else 1
        for setting, stream in zip(("samples", "validation_samples"), ids.values(), strict=True):
            if len(stream) <= window:
                shorter = ", or lower model.max_contexts" if has_contexts else ""
                raise UserError(
                    f"The conversations of data.{setting} have {len(stream)} tokens; they need more than "
                    f"{window}, one context window: use more or longer conversations{shorter}."
                )
        return ids

    @cached_property
    @status_line("Building the model")
    def model(self) -> ContextKV:
        """The model on its device. It is untrained until a stage trains or loads its parts."""
        model = self.new_model()
        try_plugins(model, self.config.plugins)
        return model

    def new_model(self, other_seed: bool = False) -> ContextKV:
        """Build the untrained model on its device. If `other_seed` is True, all random weights differ."""
        config, log_unigram = self.config, log_frequencies(self.config.data, self.texts.get("corpus"))
        if other_seed:
            config = config.replace({"runtime.seed": config.runtime.seed ^ 1})
        return frozen_model(config, self.token_table.weight, log_unigram).to(self.device)

    @cached_property
    def digests(self) -> dict[str, Any]:
        """All entries of stage tables that are not settings. They are computed without loading large data."""
        data, corpus = self.config.data, self.texts.get("corpus")
        counted = "" if corpus is None or data.unigram == "none" else corpus.fingerprint
        shape = (self.config.model.hidden_size, self.config.runtime.seed)
        return {
            "code": result_code(),
            "training text": self.texts["train"].fingerprint,
            "validation text": self.texts["validation"].fingerprint,
            "test text": self.texts["test"].fingerprint,
            "tokenizer": tokenizer_digest(data.tokenizer),
            "token table": table_fingerprint(data, *shape, corpus),
            "token frequencies": f"{data.unigram} {counted}",
            "precision": self.precision,
            "code of saved models": source_digest(*sorted(IN_SAVED_MODELS)),
        }


@status_line("Reading the conversations")
def read_splits(config: ExperimentConfig) -> dict[str, Conversations]:
    """Read the conversations of an experiment.

    Raises:
        UserError: The source of the conversations is missing or damaged, or has too few conversations.
    """
    splits: list[Split] = ["train", "validation", "test"]
    splits += ["corpus"] if config.data.reads_corpus else []
    return {split: load_conversations(config.data, split) for split in splits}
