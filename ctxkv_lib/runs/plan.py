"""What an experiment is computed from: its texts, tokens, token table and model, and the inputs of its steps.

`Plan.inputs` says which settings and digests each step depends on; `store.py` says what inputs are. A new
setting of a group that a step lists, such as `phase2`, counts for this step without further changes. Another
new setting must be added where `Plan` chooses settings; a test fails until somebody says which steps it
changes.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.config import Split
from ..data.conversations import Conversations, load_conversations
from ..data.hub import GPT2
from ..data.tokens import TokenStream, load_tokenizer, train_stream, validation_stream
from ..errors import UserError
from ..method.model import ContextKV
from ..plugins.plugins import KINDS, PACKAGE_PREFIX
from ..progress import status_line
from ..store import VERSION_PREFIX, Inputs, code_inputs, flat, inputs_of
from .build import log_frequencies, model_with_table
from .config import ExperimentConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The version of each step's results. Raise a version if the golden numbers change: finished runs are then
# computed again, and their trained models are replaced only with --again.
VERSIONS = {"table": 1, "contexts": 1, "phase2": 1, "test": 1}
BUILDING = ("runs.build", "runs.device", "data.token_table")  # the modules that build the model
# The modules that compute each step. The modules of `method` that they import count, too.
MODULES = {
    "table": ("data.cooccurrence",),
    "contexts": ("runs.contexts", *BUILDING),
    "phase2": ("runs.training", "data.kneser_ney", *BUILDING),
    "test": ("runs.testing", "runs.contexts"),
}
CONTEXT_SETTINGS = ("phase1", "block", "loss", "model.context_dim", "model.hidden_size")
TABLE_SETTINGS = ("data.table", "data.row_length")


class Plan:
    """An experiment before it is computed. Texts, tokens and model are read or built when they are needed.

    Attributes:
        config: the experiment's settings and plug-ins.
        path: the run folder.
        precision: dtype of Phase 2's matrix products, "fp32" or "bf16".
    """

    def __init__(
        self, config: ExperimentConfig, path: Path, device: torch.device, precision: str = "fp32"
    ) -> None:
        self.config, self.path, self.device, self.precision = config, path, device, precision

    @property
    def splits(self) -> list[Split]:
        """The splits that the experiment reads."""
        return ["train", "validation", "test", *(("corpus",) if self.config.data.reads_corpus else ())]

    @cached_property
    @status_line("Reading the conversations")
    def texts(self) -> dict[Split, Conversations]:
        """The conversations of each split. Raises UserError if they cannot be read, or are too few."""
        return {split: load_conversations(self.config.data, split) for split in self.splits}

    @cached_property
    @status_line("Reading the tokenizer")
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        return load_tokenizer(self.config.data.tokenizer)

    @cached_property
    def tokens(self) -> dict[Split, TokenStream]:
        """The tokens of each split, except an empty test.

        Raises:
            UserError: A stream that Phase 2 reads is too short: it must be longer than one context window.
        """
        join = {"validation": validation_stream, "test": validation_stream}
        tokens = {
            split: join.get(split, train_stream)(texts, self.tokenizer)
            for split, texts in self.texts.items()
            if len(texts)
        }
        window = self.config.model.context_window if self.config.has_contexts else 1
        trained_on: tuple[tuple[str, Split], ...] = (
            ("samples", "train"),
            ("validation_samples", "validation"),
        )
        for setting, split in trained_on:
            if (count := len(tokens[split].ids)) <= window:
                lower = "lower model.max_contexts, " if self.config.has_contexts else ""
                raise UserError(
                    f"The conversations of data.{setting} have {count} tokens; they need more than {window}, "
                    f"one context window: raise data.{setting}, {lower}or use longer conversations."
                )
        return tokens

    @property
    def ids(self) -> dict[str, Tensor]:
        """Token ids of the streams "train" and "val", uint16 `[n + 1]` on the CPU."""
        return {"train": self.tokens["train"].ids, "val": self.tokens["validation"].ids}

    @cached_property
    def model(self) -> ContextKV:
        """The model on its device. It is untrained until a step trains or loads its parts."""
        counted = self.config.data.unigram == "corpus"
        log_unigram = log_frequencies(self.tokens["corpus"]) if counted else None
        return model_with_table(self.config, self.path, log_unigram).to(self.device)

    def digest(self, split: Split) -> str:
        return self.tokens[split].digest if split in self.tokens else ""

    @cached_property
    def inputs(self) -> dict[str, Inputs]:
        """The inputs of each step, and of the contexts in the store, by name.

        There is no `table` unless the token table is computed from text, and there are no `contexts` if the
        layer reads tokens.
        """
        data, precision = self.config.data, {"precision": self.precision}
        streams = {"train text": self.digest("train"), "validation text": self.digest("validation")}
        corpus = {"corpus text": self.digest("corpus")} if data.reads_corpus else {}
        inputs: dict[str, Inputs] = {}
        if data.table == "cooccurrence":
            chosen, _ = self._chosen("data.neighbours", "model.hidden_size")
            inputs["table"] = inputs_of(chosen, corpus, code=code_of("table"))
        table = {"GPT-2's revision": GPT2[1]} if data.table == "gpt2" else {}
        if self.config.has_contexts:
            chosen, codes = self._chosen(
                *CONTEXT_SETTINGS, *TABLE_SETTINGS, "runtime.seed", "runtime.embedding_cache"
            )
            digests = streams | table | codes
            inputs["contexts"] = inputs_of(
                chosen | precision, digests, code=code_of("contexts", *self._own("block", "loss")), **inputs
            )
        chosen, codes = self._chosen(
            "model", "phase2", "layer", "data.unigram", *TABLE_SETTINGS, "runtime.seed"
        )
        counted = corpus if data.unigram == "corpus" else {}
        inputs["phase2"] = inputs_of(
            chosen | precision,
            streams | table | counted | codes,
            code=code_of("phase2", *self._own("layer")),
            **inputs,
        )
        before = {name: inputs[name] for name in ("table", "phase2") if name in inputs}
        tested = {"test text": self.digest("test")}
        inputs["test"] = inputs_of({}, tested, code=code_of("test"), **before)
        return inputs

    def _chosen(self, *names: str) -> tuple[dict[str, Any], dict[str, str]]:
        """Return settings by name, and digests of the code of plug-ins.

        Each of `names` is a group, a kind of plug-in, or a single setting. If there is no plug-in of a kind,
        its setting `KIND.plugin` is None.
        """
        values: dict[str, Any] = {f"{kind}.plugin": None for kind in KINDS} | self.config.flat()
        chosen = {name: value for name, value in values.items() if {name, name.partition(".")[0]} & {*names}}
        codes = {f"code of {kind}": chosen.pop(f"{kind}.code", "") for kind in KINDS}
        return chosen, {name: code for name, code in codes.items() if code}

    def _own(self, *kinds: str) -> list[str]:
        """Return the modules of this package that define plug-ins of these kinds."""
        names = [self.config.plugins[kind].name for kind in kinds if kind in self.config.plugins]
        modules = [name.partition(":")[0] for name in names if name.startswith(PACKAGE_PREFIX)]
        return [module.removeprefix(PACKAGE_PREFIX) for module in modules]


def code_of(step: str, *modules: str) -> Inputs:
    """Return the inputs that identify the code of a step, and of `modules` that it uses, too."""
    return code_inputs(step, VERSIONS[step], *MODULES[step], *modules)


def changed_code(inputs: Inputs) -> str:
    """Describe which steps of a trained run have another version of results by now. Return "" if none has."""
    made_with, words = flat(inputs), []
    for step, version in VERSIONS.items():
        if (name := VERSION_PREFIX + step) in made_with and made_with[name] != version:
            words.append(f"{name} {made_with[name]} → {version}")
    return ", ".join(words)
