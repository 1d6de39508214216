"""Mix the predictions of four caches of recent tokens into n-gram models or a trained model.

`python notebooks/study/ngram_caches.py SAMPLES...` prints the rows of `results/fair/ngrams.json` for these
numbers of training conversations. `python notebooks/study/ngram_caches.py RUN...` prints the validation
perplexity of finished runs with zero to four caches.

A cache predicts the tokens that followed the same history earlier in the text. The weight of each cache is
fitted on the validation text.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

import ctxkv_lib as ctxkv
from ctxkv_lib.data.kneser_ney import smoothed_unigram
from ctxkv_lib.data.token_table import token_counts
from ctxkv_lib.measure import ngrams
from ctxkv_lib.measure.ngrams import Floats, Ids

# Caches count the last `WINDOW` tokens, except the second cache, which counts the last `NEAR` tokens.
WINDOW, NEAR = 640, 100

# Token probabilities `[n]` by name of the stream. Weights of caches are fitted on the stream "val".
Streams = Mapping[str, Floats]


def recent_shares(ids: Ids, window: int, order: int = 1) -> Floats:
    """Compute how often each token followed its history in the last `window` tokens.

    The history of a token is the `order - 1` tokens before it. For token ids `[n]`, returns `[n - 1]` shares,
    one for each token except the first: the share of the history's occurrences that this token followed. The
    share is NaN if the history has not occurred.
    """
    grams, of_history = ids, np.ones(len(ids) - 1)
    for length in range(2, order + 1):
        histories = np.roll(grams, 1)
        # Incomplete histories get negative numbers, so they differ from all other histories.
        histories[: length - 1] = -np.arange(1, length)
        of_history = ngrams.recent_shares(histories, window)
        grams = np.unique(histories * (ids.max() + 1) + ids, return_inverse=True)[1]
    with np.errstate(invalid="ignore"):
        return ngrams.recent_shares(grams, window) / of_history


def four_caches(ids: Ids, window: int) -> list[Floats]:
    """Compute shares for four caches: single tokens, the last `NEAR` single tokens, pairs and triples."""
    return [recent_shares(ids, *cache) for cache in ((window, 1), (NEAR, 1), (window, 2), (window, 3))]


def with_caches(models: Streams, caches: Mapping[str, list[Floats]]) -> list[Streams]:
    """Mix caches into a model's probabilities, one after the other, wherever a cache has a prediction.

    Returns a list: the probabilities without caches, with the first cache, with the first two, and so on.
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
    """Compute perplexities from probabilities, and each test conversation's mean loss in nats."""
    losses = {name: -np.log(likely) for name, likely in streams.items()}
    return {
        **{f"{name}_ppl": round(float(np.exp(loss.mean())), 3) for name, loss in losses.items()},
        "test_conversations": [
            round(float(part.mean()), 4) for part in np.split(losses["test"], starts[1:] - 1)
        ],
    }


def ngram_rows(samples: int, preset: str = "offline", **splits: int) -> dict[str, dict[str, Any]]:
    """Measure n-grams with and without caches, and with and without counts of the token table's text.

    The order, the prior and the cache weights are those with the lowest validation perplexity.
    """
    data = ctxkv.build_config(
        preset, "tuned", samples, {f"data.{name}": size for name, size in splits.items()}
    ).data
    read, tokenizer = ctxkv.load_conversations, ctxkv.load_tokenizer(data.tokenizer)
    texts = {"val": read(data, "validation"), "test": read(data, "test")}
    streams = {name: ctxkv.validation_stream(text, tokenizer) for name, text in texts.items()}
    ids = {name: stream.ids.numpy().astype(np.int64) for name, stream in streams.items()}
    train = ctxkv.train_stream(read(data, "train"), tokenizer).ids.numpy().astype(np.int64)
    corpus = ctxkv.train_stream(read(data, "corpus"), tokenizer)
    priors = {"table text": smoothed_unigram(token_counts(corpus).numpy())}
    priors["uniform"] = np.full_like(priors["table text"], 1 / len(priors["table text"]))
    caches = {name: four_caches(stream, WINDOW) for name, stream in ids.items()}
    rows = {}
    for kind, counted in (("", train), ("_table", np.concatenate([corpus.ids.numpy(), train]))):
        models = {name: ngrams.kneser_ney(counted, stream, priors) for name, stream in ids.items()}
        choices = ({name: model[choice] for name, model in models.items()} for choice in models["val"])
        tried = [with_caches(choice, caches) for choice in choices]
        for number, name in ((0, ""), (1, "_cache"), (4, "_caches")):
            found = [measured(mixed[number], streams["test"].starts.numpy()) for mixed in tried]
            rows[f"kneser_ney{kind}{name}"] = min(found, key=lambda row: row["val_ppl"])
    return rows


def print_run(path: str) -> None:
    """Print a run's validation perplexity with zero, one, two, three and four caches."""
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
