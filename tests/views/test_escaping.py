"""Reports and model cards show text from files and names as it is: never markup, script or mathematics."""

import re

from sample_runs import sample_run

from ctxkv_lib.files import read_json, write_json
from ctxkv_lib.report import write_report
from ctxkv_lib.report.model_card import model_card
from ctxkv_lib.report.tables import literal
from ctxkv_lib.runs.run_folder import load_run

HOSTILE = """<script>alert('1')</script> <img onerror="alert(2)"> & $x$ $\\bad{ | a | `b` **c** [d](e)"""


def outside_text_in(folder):
    """A finished run whose every text from outside is hostile."""
    settings = {"data.source": "file", "data.path": HOSTILE}
    sample_run(folder, preset="ci", settings=settings)
    summary = read_json(folder / "summary.json")
    summary["provenance"]["device"] = HOSTILE
    summary["provenance"]["versions"] = {"torch": HOSTILE}
    summary["phase1"]["context_method"] = "exact"
    write_json(folder / "summary.json", summary)
    return load_run(folder)


def test_reports_and_cards_hold_no_markup_of_others(tmp_path):
    run = outside_text_in(tmp_path / "run")
    for text in (write_report([run], "en"), write_report([run], "ja"), model_card(run)):
        assert "<script" not in text
        assert "<img" not in text
        assert literal(HOSTILE) in text
        for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
            columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(columns) == 1, table


def test_literal_text_has_no_live_markdown():
    assert literal("a | b\n`c` <d> $e$") == r"a \| b \`c\` &lt;d&gt; \$e\$"
    assert literal("2026-01-31, cpu (x86, 2 threads)") == "2026-01-31, cpu (x86, 2 threads)"
