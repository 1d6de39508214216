"""One word for one thing, the field's own: names and sentences that were replaced do not come back."""

import re
from pathlib import Path

import pytest
from conftest import TOP

PLACES = "*.md Makefile ctxkv_lib/**/*.* tests/**/*.py docs/*.* notebooks/*.ipynb notebooks/study/*.md"
KINDS = ("", ".py", ".pyi", ".j2", ".md", ".ipynb")
FILES = sorted(file for place in PLACES.split() for file in TOP.glob(place) if file.suffix in KINDS)

# The words, by what to write instead.
REPLACED = {
    "packages, layers, public API": r"\brooms\b|front door",
    "random init, structured init": r"weights (are )?drawn\b|\bla(y|ys|id|ying) (\w+ ){0,4}out\b",
    "initialised as, init_weights": r"\bbegins? as\b",
    "memory span": r"(?-i:\bhorizons?\b)|\btraces? of \d|\bheld by (a|some|any) slot",
    "compared with, n-gram baselines": r"\bheld against\b|yardstick",
    "untrained block": r"\bfresh(ly)?[ _](initialised |drawn )?(block|weights|contexts?|model)",
    "input projections": r"token[ _]hal(f|ves)\b",
    "segmented scan, segments, perturbed copies": r"\bwalk(s|ed)? the stream|\bseams?\b|\btwins?\b",
    "all-reduce, broadcast, run on rank 0": r"\bsum_\(|\bshare_\(|\bfrom_first\b|\bfirst process\b",
    "load_state, EMA update, EMA decay, no_decay": r"\bput[ _]back\b|\btake_in\b|\btaken in by\b|\bspared\b",
    "lr_lambda, init_running_means, init_shift_register": r"rate_factor|\bhold_(means|tokens)\b",
    "induction-head init, bias init per_head": r"heads that look up|\bheads? a slot\b|\bnear heads\b",
    "current-token logit bias, no input residual": r"repeat[ _]logit|\boutput[ .=]+.?attended\b",
    "directional or symmetric co-occurrence": r"(?-i:\btables? (by (the )?sides|(by those )?around)\b)",
    "embedding norm": r"\brow length\b|\brows (of the table )?(\S+ long|as long as)\b",
    "summary parts, measurements, grid points": r"\bfacts\b|_facts\b|(?-i:MEASURES)|\d cells|\bof a cell\b",
    "reference, within seed noise": r"straight_line|seeds lie apart",
    "printed, says": r"\btold\b(?! apart)|\btells badges|writes and speaks|learned is to speak",
    "the subject first": r"\bof one run its\b|\bword for word they\b|\bwhat another has\b|\bseldom\b",
    "its place, as a path": r"\bmust lie in\b",
    "memory span, untrained, segment boundary, table": r"痕跡|地平|新品|継ぎ目|双子|物差し|部屋",
}
# Keys and names in the files of finished runs and studies, which must stay readable.
CONTRACTS = r"""["'.`](horizon|fresh)\b"""


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if file != Path(__file__)],
    ids=lambda file: file.relative_to(TOP).as_posix(),
)
def test_replaced_words_do_not_come_back(file):
    text = re.sub(CONTRACTS, "", file.read_text(encoding="utf-8"))
    for instead, words in REPLACED.items():
        found = re.search(
            words.replace(" ", r"\s+"), text, re.IGNORECASE
        )  # a sentence may go on in the next line
        assert not found, f"line {text.count(chr(10), 0, found.start()) + 1}: write {instead}"
