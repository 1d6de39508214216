"""The pages of the site: every field and column is explained, and cells are Python."""

import re

import pytest
from conftest import TOP, write_conversations

from ctxkv_lib.experiments import write_comparison
from ctxkv_lib.files import read_json
from ctxkv_lib.report.terminal import format_runs
from ctxkv_lib.runs.run_folder import load_run
from ctxkv_lib.runs.trained import evaluate_texts

PAGES = {path.name: path.read_text(encoding="utf-8") for path in [TOP / "README.md", *TOP.glob("docs/*.md")]}
FIELDS = PAGES["fields.md"]
OPTIONAL = ("ngrams.kneser_ney_table_cache",)  # of a table made from text


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
    found = {
        (path[0], *path[3:]) if path[1:2] == ("untrained",) else path for path in paths(measured.summary)
    }
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


def test_columns_of_lists_are_explained():
    listed = re.split(r"\s{2,}", format_runs([]))
    assert code(first_cells(section(FIELDS, "Columns of `ctxkv list`"))) == listed


@pytest.mark.parametrize("page", sorted((TOP / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_the_cells_of_a_page_are_python(page):
    """The site executes them, minutes later."""
    for cell in re.findall(r"(?s)```\{code-cell\} python\n(.*?)```", page.read_text(encoding="utf-8")):
        compile(re.sub(r"(?m)^:tags:.*$", "", cell), page.name, "exec")
