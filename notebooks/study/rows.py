"""The names of the results' rows on the study's pages, and the pairs of rows that are compared."""

# Names of rows on the pages. A row that is not listed has the same name as in the results.
NAMES = {
    "tuned": "`tuned` without copying",
    "tuned with copying": "`tuned`, copying added after training",
    "tuned, copying": "`tuned`",
    "exact": "`exact`",
    "exact, untrained": "`exact` without Phase 1",
    "exact, one slot": "`exact`, only the current context",
    "exact, directional table": "`exact`, token table of `tuned`",
    "exact, decorrelation": "`exact`, decorrelation",
    "exact, last tokens": "`exact`, reconstructs the last 4 tokens",
    "exact, next embedding": "`exact`, predicts the next embedding",
    "base": "unchanged",
    "interval 50": "slots 50 tokens apart",
    "interval 100": "slots 100 tokens apart",
    "variable count": "masked slots (`kv_method=variable`)",
    "gated, end to end": "gated contexts",
    "OACD": "`tuned` without copying",
    "untrained": "`tuned` without copying and Phase 1",
    "no contexts": "the current token alone",
    "untrained ContextBlock": "contexts, without Phase 1",
    "ContextBlock trained end to end": "contexts, ContextBlock trained with the layer, end to end",
    "all tokens": "keys and values of all tokens, a usual layer",
    "kneser_ney": "n-grams",
    "kneser_ney_cache": "n-grams and a unigram cache",
    "kneser_ney_caches": "n-grams and four caches",
    "kneser_ney_table_caches": "n-grams and four caches, with the token table's text",
}

# Rows that the table of changes leaves out: `tuned` under another name, and rows that add nothing new.
LEFT_OUT = (
    "bias nearest, means to 40 tokens",
    "means to 40 tokens, OACD rate 0.0005",
    "means to 40 tokens, untrained",
    "random init, bias from 0, symmetric table, no current-token bias, all weights decay by the step",
)
# For each table of differences: the number of test conversations, and then the pairs of rows.
PAIRS = {
    "beside_ngrams": (
        10,
        "exact / kneser_ney",
        "tuned / kneser_ney_caches",
        "tuned, copying / tuned",
        "tuned, copying / kneser_ney_caches",
        "tuned, copying / kneser_ney_table_caches",
        "tuned with copying / kneser_ney_table_caches",
    ),
    "beside_alternatives": (
        50,
        *(f"{ours} / GPT" for ours in ("exact", "contexts", "contexts with copying")),
        *(f"{ours} / LSTM" for ours in ("exact", "contexts", "contexts with copying")),
    ),
    "beside_models": (
        50,
        "exact / kneser_ney",
        "contexts / no contexts",
        "contexts / tokens at the same slots",
        "contexts / last 32 tokens",
        "contexts / all 640 tokens",
        "contexts / GRU",
        "contexts with copying / GRU",
        "contexts with copying / kneser_ney_table_caches",
        "GRU with four caches / contexts with copying and four caches",
        "GRU with a continuous cache / contexts with copying",
        "gated, end to end / GRU",
    ),
    "beside_phase1": (
        50,
        "exact, untrained / exact",
        "exact, decorrelation / exact",
        "exact, last tokens / exact",
        "exact, last tokens / exact, untrained",
        "exact, next embedding / exact, untrained",
        "exact, one slot / exact",
        "untrained / OACD",
        "random init, OACD / random init, untrained",
        "untrained / random init, OACD",
        "predictive / gated, untrained",
        "predictive / OACD",
        "predictive and OACD / predictive",
        "autoencoding / gated, untrained",
    ),
}


def label(variant: str) -> str:
    base, _, kind = variant.partition(" with ")
    return NAMES.get(variant) or NAMES.get(base, base) + (kind and f" with {kind}")
