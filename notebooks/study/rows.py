"""The names of the results' rows on the study's pages, and the pairs of rows that are compared."""

# Names of rows on the pages. A row that is not listed has the same name as in the results.
NAMES = {
    "contexts": "context model",
    "tuned": "`tuned` without copying",
    "tuned with copying": "`tuned`, copying added after training",
    "tuned, copying": "`tuned`",
    "published": "`published`",
    "exact": "`exact`",
    "exact, untrained": "`exact` without Phase 1",
    "exact, one slot": "`exact`, only the current context",
    "exact, directional table": "`exact`, token table of `tuned`",
    "exact, decorrelation": "`exact`, decorrelation",
    "exact, last tokens": "`exact`, reconstructs the last 4 tokens",
    "exact, next embedding": "`exact`, predicts the next embedding",
    "base": "unchanged `exact`",
    "interval 50": "slots 50 tokens apart",
    "interval 100": "slots 100 tokens apart",
    "variable count": "masked slots",
    "gated, end to end": "gated context model",
    "OACD": "`tuned` without copying",
    "untrained": "`tuned` without copying and Phase 1",
    "no contexts": "the current token alone",
    "untrained ContextBlock": "context model without Phase 1",
    "ContextBlock trained end to end": "context model, ContextBlock trained with the layer, end to end",
    "all tokens": "keys and values of all tokens, a usual layer",
    "kneser_ney": "n-grams",
    "kneser_ney_cache": "n-grams and a unigram cache",
    "kneser_ney_caches": "n-grams and four caches",
    "kneser_ney_table": "n-grams, with the token table's text",
    "kneser_ney_table_cache": "n-grams and a unigram cache, with the token table's text",
    "kneser_ney_table_caches": "n-grams and four caches, with the token table's text",
}

# Rows that the table of changes leaves out: `tuned` under another name, and rows that add nothing new.
LEFT_OUT = (
    "bias nearest, means to 40 tokens",
    "means to 40 tokens, OACD rate 0.0005",
    "means to 40 tokens, untrained",
    "random init, bias from 0, symmetric table, no current-token bias, all weights decay by the step",
)
# Pairs of rows that are compared on 50 test conversations. For each table: first the pairs on the page of the
# study, which its figure draws, and then further pairs, which only the appendix has.
PAIRS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "beside_ngrams": (
        (
            "exact / kneser_ney",
            "exact / kneser_ney_caches",
            "no contexts / kneser_ney_caches",
            "contexts / kneser_ney_caches",
            "contexts with copying / kneser_ney_caches",
            "contexts with copying / kneser_ney_table_caches",
        ),
        (
            "contexts / kneser_ney",
            "contexts / kneser_ney_table_caches",
            "contexts with copying / contexts",
            "GRU / kneser_ney_table_caches",
        ),
    ),
    "beside_alternatives": (
        (
            "LSTM / contexts",
            "LSTM / contexts with copying",
            "GPT / contexts",
            "GPT / contexts with copying",
        ),
        ("GPT / no contexts", "exact / LSTM", "exact / GPT"),
    ),
    "beside_models": (
        (
            "contexts / no contexts",
            "tokens at the same slots / contexts",
            "last 32 tokens / contexts",
            "GRU / contexts",
            "gated, end to end / GRU",
            "GRU / contexts with copying",
            "GRU with a continuous cache / contexts with copying",
        ),
        (
            "all 640 tokens / contexts",
            "gated, end to end / contexts",
            "GRU with four caches / contexts with copying and four caches",
        ),
    ),
    "beside_phase1": (
        (
            "exact, untrained / exact",
            "exact, last tokens / exact, untrained",
            "exact, next embedding / exact, untrained",
            "untrained / OACD",
            "predictive / OACD",
        ),
        (
            "exact, decorrelation / exact",
            "exact, last tokens / exact",
            "exact, one slot / exact",
            "random init, OACD / random init, untrained",
            "untrained / random init, OACD",
            "predictive / gated, untrained",
            "predictive and OACD / predictive",
            "autoencoding / gated, untrained",
        ),
    ),
    "beside_proposals": (
        (
            "interval 50 / base",
            "interval 100 / base",
            "64 contexts / base",
            "dropout 0.3 / base",
            "weight decay 0.1 / base",
            "variable count / base",
        ),
        (),
    ),
}
# Pairs that are compared on the 10 test conversations of the first study.
FIRST_PAIRS = (
    "exact / kneser_ney",
    "tuned / kneser_ney_caches",
    "tuned, copying / tuned",
    "tuned, copying / kneser_ney_caches",
    "tuned, copying / kneser_ney_table_caches",
    "tuned with copying / kneser_ney_table_caches",
)


def label(variant: str) -> str:
    base, _, kind = variant.partition(" with ")
    return NAMES.get(variant) or NAMES.get(base, base) + (kind and f" with {kind}")
