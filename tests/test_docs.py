"""The pages of the site: every field, column and word is explained, and what they quote is there."""

import re
from itertools import pairwise

import pytest
import yaml
from conftest import TOP, write_conversations

from ctxkv_lib.cli import main
from ctxkv_lib.experiments import write_comparison
from ctxkv_lib.files import read_json
from ctxkv_lib.report.document import write_report
from ctxkv_lib.report.tables import format_runs
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.runs.trained import evaluate_texts

PAGES = {path.name: path.read_text(encoding="utf-8") for path in [TOP / "README.md", *TOP.glob("docs/*.md")]}
FIELDS = PAGES["fields.md"]
OPTIONAL = ("recall_task.", "ngrams.kneser_ney_table_cache")  # of preset recall; of a table made from text
SMALL = {"of", "after", "the", "last", "samples", "CPU", "GPU", "positions"}


def section(page, title):
    """The text below a heading of the second level, up to the next."""
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_cells(text):
    """First cells of the rows of all tables, without their headers."""
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    return [cell for cell in rows if cell not in ("field", "column", "word", "command", "it says")]


def code(cells):
    return [name for cell in cells for name in re.findall(r"`(.+?)`", cell)]


def paths(value, path=()):
    """The path of every number or text in a summary; `[]` marks the entries of a list of objects."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from paths(each, (*path, name))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for each in value:
            yield from paths(each, (*path[:-1], f"{path[-1]}[]"))
    else:
        yield path


def matches(row, path):
    parts = row.split(".")
    same = [
        part in (name, "*") or (part == "*[]" and "[]" in name)
        for part, name in zip(parts, path, strict=False)
    ]
    return len(parts) == len(path) and all(same)


def test_every_field_of_a_summary_is_explained_and_none_that_is_gone(measured):
    rows = code(first_cells(section(FIELDS, "`summary.json`")))
    found = {(path[0], *path[3:]) if path[1:2] == ("fresh",) else path for path in paths(measured.summary)}
    assert {".".join(path) for path in found if not any(matches(row, path) for row in rows)} == set()
    named = {part for row in rows for part in row.split(".")}
    assert {name for path in found if "versions" not in path for name in path} <= named
    containers = {path[:n] for path in paths(measured.summary) for n in range(1, len(path) + 1)}
    gone = [row for row in rows if not any(matches(row, path) for path in containers)]
    assert [row for row in gone if not row.startswith(OPTIONAL)] == []


def test_every_field_of_a_comparison_is_explained_and_none_that_is_gone(two_runs, tmp_path):
    write_comparison([load_run(path) for path in two_runs], tmp_path / "both")
    found = read_json(tmp_path / "both" / "comparison.json")
    names = {".".join(path) for path in paths({**found, "runs": []})}
    assert {*code(first_cells(section(FIELDS, "`comparison.json`")))} == names


def test_every_field_of_an_evaluation_is_explained_and_none_that_is_gone(measured, tmp_path):
    write_conversations(tmp_path / "other.jsonl", 3, seed=5)
    found = {*paths(evaluate_texts(measured, tmp_path / "other.jsonl"))}
    rows = code(first_cells(section(FIELDS, "`evaluation/*.json`")))
    assert [path for path in found if not any(matches(row, path) for row in rows)] == []
    containers = {path[:n] for path in found for n in range(1, len(path) + 1)}
    assert [row for row in rows if not any(matches(row, path) for path in containers)] == []


def test_columns_of_lists_and_sweeps_are_explained():
    listed = re.split(r"\s{2,}", format_runs([]))
    assert code(first_cells(section(FIELDS, "Columns of `ctxkv list`"))) == listed
    swept = code(first_cells(section(FIELDS, "Columns of a sweep's table")))
    for path in TOP.glob("notebooks/study/results/*/sweep.md"):
        tables = [
            line.strip("| ").split(" | ") for line in path.read_text("utf-8").splitlines() if line[:1] == "|"
        ]
        columns = {cell.split(",")[0] for row, rule in pairwise(tables) if rule[0] == "---" for cell in row}
        assert columns <= {*swept}


def test_words_of_a_report_are_explained(measured, two_runs):
    """Column names and first cells of all its tables are made of the words on the page."""
    cells = first_cells(section(FIELDS, "Words of a report"))
    terms = sorted({term for cell in cells for term in [cell, *cell.split(", ")]}, key=len, reverse=True)
    known = re.compile("|".join(map(re.escape, terms)), re.IGNORECASE)
    text = write_report([measured]) + write_report([load_run(path) for path in two_runs])
    tables = [
        line.strip("| ").replace("*", "").split(" | ") for line in text.splitlines() if line[:2] == "| "
    ]
    shown = {row[0] for row in tables}
    shown |= {cell for row, below in pairwise(tables) if below[0] == "---" for cell in row}
    left = {words: {*re.findall("[A-Za-z]+", known.sub(" ", words))} - SMALL for words in shown}
    assert {words: others for words, others in left.items() if others} == {}


def test_refusals_are_quoted_as_they_are_said():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (TOP / "ctxkv_lib").rglob("*.py"))
    quoted = code(first_cells(PAGES["refusals.md"]))
    assert len(quoted) > 8
    assert [words for words in quoted if words not in source] == []


def test_every_command_is_on_its_page(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"(?m)^ {4}(\w+)", capsys.readouterr().out)
    shown = {words.split()[1] for words in code(first_cells(PAGES["commands.md"])) if words[:6] == "ctxkv "}
    assert "run" in commands
    assert {*commands} <= shown


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "OACD" in text])
def test_oacd_is_expanded_where_it_first_appears(page):
    assert PAGES[page].index("Origin-Anchored") - PAGES[page].index("OACD") < len("OACD (") + 1


def test_a_search_engine_can_show_what_the_first_page_says_of_itself():
    description = yaml.safe_load(PAGES["index.md"].split("---")[1])["myst"]["html_meta"]["description"]
    assert "32 compressed context vectors, one every 20 tokens back" in description
    assert len(description) < 160  # what it shows


@pytest.mark.parametrize("page", sorted((TOP / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_the_cells_of_a_page_are_python(page):
    """The site executes them, minutes later."""
    for cell in re.findall(r"(?s)```\{code-cell\} python\n(.*?)```", page.read_text(encoding="utf-8")):
        compile(re.sub(r"(?m)^:tags:.*$", "", cell), page.name, "exec")
