"""Mix four caches of recent tokens into n-gram models, or into a trained model.

`python notebooks/study/ngram_caches.py SAMPLES...` prints the rows of `results/fair/ngrams.json` for these
numbers of training conversations. `python notebooks/study/ngram_caches.py RUN...` prints the validation
perplexity of finished runs with zero to four caches.

A cache predicts tokens that followed the same history earlier in the text. The weight of each cache is fitted
on the validation text.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

import ctxkv_lib as ctxkv
from ctxkv_lib.data.kneser_ney import smoothed_unigram
from ctxkv_lib.data.token_table import corpus_counts, corpus_ids
from ctxkv_lib.measure import ngrams
from ctxkv_lib.measure.ngrams import Floats, Ids

WINDOW, NEAR = 640, 100  # tokens that the caches count; the second cache counts only `NEAR`

Streams = Mapping[str, Floats]  # token probabilities `[n]` by stream; caches are fitted on "val"


def recent_shares(ids: Ids, window: int, order: int = 1) -> Floats:
    """Compute how often each token (except the first) followed its history in the last `window` tokens.

    The history of a token is the `order - 1` tokens before it. For ids `[n]`, returns shares `[n - 1]` of the
    occurrences of the history, or NaN if the history has not occurred.
    """
    grams, of_history = ids, np.ones(len(ids) - 1)
    for length in range(2, order + 1):
        histories = np.roll(grams, 1)
        histories[: length - 1] = -np.arange(1, length)  # incomplete histories differ from all others
        of_history = ngrams.recent_shares(histories, window)
        grams = np.unique(histories * (ids.max() + 1) + ids, return_inverse=True)[1]
    with np.errstate(invalid="ignore"):
        return ngrams.recent_shares(grams, window) / of_history


def four_caches(ids: Ids, window: int) -> list[Floats]:
    """Compute shares for four caches: single tokens (all, and the last `NEAR`), pairs, and triples."""
    return [recent_shares(ids, *cache) for cache in ((window, 1), (NEAR, 1), (window, 2), (window, 3))]


def with_caches(models: Streams, caches: Mapping[str, list[Floats]]) -> list[Streams]:
    """Mix caches into a model's probabilities, one after the other, wherever they have a prediction.

    Returns the probabilities with no cache, the first cache, the first two caches, and so on.
    """
    mixed = [models]
    for number, on_validation in enumerate(caches["val"]):
        known = ~np.isnan(on_validation)
        weight = ngrams.cache_weight(mixed[-1]["val"][known], on_validation[known]) if known.any() else 0.0
        shares = {name: (mixed[-1][name], cache[number]) for name, cache in caches.items()}
        mixed.append({
            name: np.where(np.isnan(share), model, (1 - weight) * model + weight * share)
            for name, (model, share) in shares.items()
        })  # fmt: skip
    return mixed


def measured(streams: Streams, starts: Ids) -> dict[str, Any]:
    """From probabilities, compute perplexities and the mean loss of each test conversation in nats."""
    losses = {name: -np.log(likely) for name, likely in streams.items()}
    return {
        **{f"{name}_ppl": round(float(np.exp(loss.mean())), 3) for name, loss in losses.items()},
        "test_conversations": [
            round(float(part.mean()), 4) for part in np.split(losses["test"], starts[1:] - 1)
        ],
    }


def ngram_rows(samples: int, preset: str = "offline", **splits: int) -> dict[str, dict[str, Any]]:
    """Measure n-grams with and without caches, on the training text alone and with the token table's text.

    Order, prior and cache weights are chosen by the lowest validation perplexity.
    """
    data = ctxkv.build_config(
        preset, "tuned", samples, {f"data.{name}": size for name, size in splits.items()}
    ).data
    read, tokenizer = ctxkv.load_conversations, ctxkv.load_tokenizer(data.tokenizer)
    texts = {"val": read(data, "validation"), "test": read(data, "test")}
    streams = {name: ctxkv.validation_stream(text, tokenizer) for name, text in texts.items()}
    ids = {name: stream.ids.numpy().astype(np.int64) for name, stream in streams.items()}
    train = ctxkv.train_stream(read(data, "train"), tokenizer).ids.numpy().astype(np.int64)
    corpus = read(data, "corpus")
    priors = {"table text": smoothed_unigram(corpus_counts(data, corpus).numpy())}
    priors["uniform"] = np.full_like(priors["table text"], 1 / len(priors["table text"]))
    caches = {name: four_caches(stream, WINDOW) for name, stream in ids.items()}
    rows = {}
    for kind, counted in (("", train), ("_table", np.concatenate([corpus_ids(data, corpus).numpy(), train]))):
        models = {name: ngrams.kneser_ney(counted, stream, priors) for name, stream in ids.items()}
        choices = ({name: model[choice] for name, model in models.items()} for choice in models["val"])
        tried = [with_caches(choice, caches) for choice in choices]
        for number, name in ((0, ""), (1, "_cache"), (4, "_caches")):
            found = [measured(mixed[number], streams["test"].starts.numpy()) for mixed in tried]
            rows[f"kneser_ney{kind}{name}"] = min(found, key=lambda row: row["val_ppl"])
    return rows


def print_run(path: str) -> None:
    """Print the validation perplexity of a run with zero to four caches."""
    trained = ctxkv.open_run(path)
    stream = trained.stream("val")
    likely = stream.token_losses().double().neg().exp().numpy()
    ids = stream.ids.numpy().astype(np.int64)
    caches = four_caches(ids, trained.run.config.model.context_window)
    mixed = with_caches({"val": likely}, {"val": caches})
    print(path, *(f"{np.exp(-np.log(streams['val']).mean()):.1f}" for streams in mixed))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if argument.isdigit():
            print(json.dumps({argument: ngram_rows(int(argument), validation_samples=50, test_samples=50)}))
        else:
            print_run(argument)
