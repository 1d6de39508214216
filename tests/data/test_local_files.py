"""A file of one's own: what is recognised, how it is split, what is said about one that cannot be taken."""

import csv
import gzip
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctxkv_lib.data import formats, local_files, rows
from ctxkv_lib.data.conversations import load_conversations, read_conversations
from ctxkv_lib.data.settings import DataConfig
from ctxkv_lib.errors import UserError
from ctxkv_lib.files import cache_dir
from ctxkv_lib.runs.config import build_config
from ctxkv_lib.runs.configure import compared_samples, configure, run_command

pytestmark = pytest.mark.usefixtures("own_cache")

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "é 你好"}]
TYPES = ("input_text", "output_text")
IMAGE = {"type": "image_url", "image_url": "https://example.com"}
PARTS = [{**m, "content": [IMAGE, *({"text": c} for c in m["content"])]} for m in CHAT]
RESPONSE = [{**m, "content": [{"type": t, "text": m["content"]}]} for m, t in zip(CHAT, TYPES, strict=True)]
SHAREGPT = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "é 你好"}]
RECORDS = {  # of the fields named in the second place, where they have unusual names
    "OpenAI": ({"messages": CHAT}, None),
    "OpenAI with a score": ({"messages": [{**m, "value": "good"} for m in CHAT]}, None),
    "OpenAI in parts": ({"messages": PARTS}, None),
    "OpenAI in parts of responses": ({"messages": RESPONSE}, None),
    "ShareGPT": ({"id": 1, "conversations": SHAREGPT}, None),
    "Alpaca": ({"instruction": "Hello?", "input": "", "output": "é 你好"}, None),
    "Alpaca without input": ({"instruction": "Hello?", "input": None, "output": "é 你好"}, None),
    "prompts": ({"prompt": "Hello?", "completion": "é 你好"}, None),
    "questions": ({"question": "Hello?", "answer": "é 你好"}, None),
    "named columns": ({"Frage": "Hello?", "Antwort": "é 你好", "text": "no"}, "Frage, Antwort"),
    "a named column of messages": ({"content": SHAREGPT, "role": "no"}, "content"),
}


def _line(number: int) -> str:
    messages = [{"role": "user", "content": f"hello {number}"}, {"role": "assistant", "content": "é 你好"}]
    return json.dumps({"id": number, "messages": messages}, ensure_ascii=False)


def _jsonl(folder: Path, count: int, name: str = "chats.jsonl") -> str:
    content = "\n".join([*map(_line, range(1, count + 1)), "", "  "]).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(folder / name)


# What is recognised


@pytest.mark.parametrize(("record", "columns"), RECORDS.values(), ids=RECORDS)
def test_known_forms_of_a_record_are_recognised(tmp_path, record, columns):
    text = json.dumps(record)
    (tmp_path / "lines.v2.jsonl").write_text(text + "\n" + text)
    (tmp_path / "array.json").write_text("\n " + json.dumps([record, record]))
    for name in ("packed.json.gz", "OLD.JSON.GZ"):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n{text}".encode())
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "table.parquet")
    for path in tmp_path.iterdir():
        assert next(iter(read_conversations(path, columns).rows))[1] == CHAT, path


@pytest.mark.parametrize(
    ("name", "separator"), [("a.csv", ","), ("b.csv", ";"), ("c.tsv", "\t"), ("d.csv.gz", ",")]
)
@pytest.mark.parametrize(("column", "named"), [("text", None), ("content", None), ("My Words", "My Words")])
def test_tables_with_a_text_column_are_recognised(tmp_path, name, separator, column, named):
    path = tmp_path / "plain"
    with path.open("w", newline="") as file:
        rows = [["id", column], [1, 'Say "hi",\nplease;'], [2, "\tThen go."]]
        csv.writer(file, delimiter=separator).writerows(rows)
    raw = path.read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert list(read_conversations(tmp_path / name, named).texts()) == ['Say "hi",\nplease;', "\tThen go."]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_other_systems_in_tables(tmp_path, end):
    (tmp_path / "a.csv").write_bytes(
        f'\ufeffid;text;;{end}1;a, b, c, d, e;;;{end}2;"two{end}lines";;{end}'.encode()
    )
    assert list(read_conversations(tmp_path / "a.csv").texts()) == ["a, b, c, d, e", f"two{end}lines"]


def test_a_tsv_is_cut_at_tabs_whatever_its_header_has(tmp_path):
    text = "b, c" * 50_000  # more than csv's own limit
    (tmp_path / "a.tsv").write_text(f"one, two, three\ttext\na\t{text}\n")
    assert list(read_conversations(tmp_path / "a.tsv").texts()) == [text]


def test_plain_text_is_cut_at_blank_lines(tmp_path):
    path = tmp_path / "talk.txt"
    path.write_bytes("\r\n\r\n\t Hello? \r\n é 你好 \f\r\n \t\r\n\r\nYes.\n\f\n\u00a0Good bye. ".encode())
    rows = read_conversations(path)
    assert list(rows.texts()) == ["Hello? \n é 你好", "Yes.", "Good bye."]
    assert rows.ids == ("txt:1", "txt:2", "txt:3")


def _parquet(names=None, **columns):
    """The bytes of a Parquet file; `names` replaces those of the columns."""
    table, file = pa.table(columns), io.BytesIO()
    pq.write_table(table.rename_columns(list(names or table.column_names)), file)
    return file.getvalue()


def _no_utf8():
    return pa.array([b"\xff"]).view(pa.string())


def test_parquet_is_read_over_several_batches(tmp_path):
    texts = [f"number {n}" for n in range(formats.PARQUET_ROWS + 3)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "texts.parquet", row_group_size=100)
    rows = read_conversations(tmp_path / "texts.parquet")
    assert list(rows.texts()) == texts
    assert rows.ids[-1] == f"parquet:{len(texts)}"


def test_a_message_without_text_is_one_that_calls_a_tool(tmp_path):
    path, blank = tmp_path / "tools.jsonl", {"role": "assistant", "content": ""}
    calls = [{**blank, "content": None, name: [{"id": "1"}]} for name in ("tool_calls", "function_call")]
    path.write_text(json.dumps({"messages": [*CHAT, *calls]}))
    ((_, messages),) = read_conversations(path).rows
    assert messages == [*CHAT, blank, blank]


# What is refused, and where it stands


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"not json", r"line 2 is not JSON \(Expecting value, column 1\)"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b"3", "line 2 has no fields; allowed: messages;"),
        (b"[1, 2]", "line 2 is a list; write a conversation a line"),
        (b'{"role": "user", "content": "a"}', "line 2 is one message; write all messages of a conversation"),
        (
            b'{"words": "hello", "n": 1}',
            r"line 2 has the fields words, n; allowed: messages; .*data.columns \(evaluate: --columns\).$",
        ),
        (b'{"Message": "hello"}', r"line 2 has the fields Message; .*Did you mean messages\?"),
        (b'{"a\\nfield": null}', r"line 2 has the fields a\\nfield; allowed"),  # in one line
        (b'{"messages": "hello"}', 'line 2: "messages" must be a list'),
        (b'{"messages": ["hello"]}', 'line 2: "messages" must be a list'),
        (b'{"messages": [{"role": "user", "content": 3}]}', 'line 2: "messages" must be a list'),
        (b'{"messages": [{"content": "a"}, {"content": 0}]}', 'line 2: "messages" must be a list'),
        (b'{"messages": [{"content": "a"}, {"content": {}}]}', 'line 2: "messages" must be a list'),
        (b'{"messages": [{"role": 3, "content": "a"}]}', 'line 2: "messages" must be a list'),
        (b'{"conversations": [{"from": "human"}]}', 'line 2: "conversations" must be a list'),
        (b'{"conversations": [{"from": "gpt", "value": null}]}', 'line 2: turn 1 has "value": null; give it'),
        (b'{"messages": [{"content": "a"}, {"content": null}]}', 'line 2: turn 2 has "content": null; give'),
        (b'{"instruction": "a", "output": null}', "line 2: its fields must be texts"),
        (b'{"question": null, "answer": "a"}', "line 2: its fields must be texts"),
        (b'{"prompt": 0, "completion": "a"}', "line 2: its fields must be texts"),
        (b'{"messages": []}', "line 2 is an empty conversation"),
        (b'{"messages": [{"role": "user", "content": " \\n"}]}', "line 2 is an empty conversation"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "line 2 is not text in UTF-8"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "line 2 holds half of a surrogate pair"),
    ],
)
def test_bad_line_is_named(tmp_path, line, sentence):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\n".join([_line(1).encode(), line, _line(3).encode()]))
    with pytest.raises(UserError, match=f"chats.jsonl, {sentence}") as raised:
        read_conversations(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.jsonl", None, " does not exist; name a .jsonl"),
        ("blank.jsonl", b"\n \n", " is blank; give"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), " is blank; give"),
        ("plain.jsonl.gz", _line(1).encode(), " cannot be read"),
        ("cut.jsonl.gz", gzip.compress(_line(1).encode(), mtime=0)[:-10], " cannot be read"),
        ("flip.txt.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 9, " cannot be read"),
        ("chats.docx", b"PK", " is of no known kind; allowed: .jsonl, .json, .csv"),
        ("chats", b"hello", " is of no known kind"),
        ("bad.parquet", b"PAR1", " cannot be read as Parquet"),
        (
            "date.parquet",
            _parquet(text=["a"], at=pa.array([10**15], pa.timestamp("ms"))),
            " cannot be read as",
        ),
        ("bytes.parquet", _parquet(text=_no_utf8()), " cannot be read as Parquet"),
        ("twice.parquet", _parquet(("text", "text"), text=["a"], more=["b"]), " has the column text twice"),
        ("blank.txt", b"\n\n", " is blank"),
        ("wide.txt", "hello".encode("utf-16-le"), ", line 1 is not text in UTF-8 .*; save it as UTF-8"),
        ("names.csv", b"id,words\n1,hello\n", ", line 1 has the fields id, words; allowed"),
        ("Case.csv", b"ID,Prompt,Completion\n1,a,b\n", r", line 1 .* Did you mean prompt, completion\?"),
        ("above.csv", b"\ntext\na\n", ", line 1 is blank; write the names of the columns"),
        ("short.csv", b"id,text\n1\n", ", line 2 has fewer cells than the header"),
        ("twice.jsonl", b'{"text": "a", "text": "b"}', ", line 1 has the field text twice"),
        ("twice.json", b'[{"text": "a", "text": "b"}]', " has the field text twice"),
        ("twice.csv", b"text,n,text\na,1,b\n", ", line 1 has the column text twice"),
        ("quote.csv", b'text\na\n"b\nc\n', ", line 3 is not CSV .*; close its quotes"),
        ("merged.csv", b'n,text\n1,"a\nb"\n2,"c\n3,"d"\n4,e\n', ", line 4 is not CSV"),
        ("quote.tsv", b'n\ttext\n1\t"a" b\n', ", line 2 is not CSV"),
        ("pretty.json", b'{\n"text": "a"}', ", line 1 is not JSON .*; write one array of conversations, or"),
        ("cut.json", b'[{"text": "a"}', " is not JSON .*; write one array of conversations, or one"),
        ("bare.csv", b"text\nhello\nfriend, today\n", ", line 3 has more cells than the header; put texts"),
        ("array.json", b'[{"text": "a"}, 3]', ", item 2 has no fields"),
        ("folder.jsonl", "folder", r" cannot be read .*; name a readable \.jsonl"),
    ],
)
def test_bad_file_is_named(tmp_path, name, content, sentence):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}{sentence}"):
        read_conversations(path)


def test_columns_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("Question,text\na,b\n")
    said = r"line 1 has the fields Question, text; allowed: question and reply, .* Did you mean question\?"
    with pytest.raises(UserError, match=said):
        read_conversations(tmp_path / "a.csv", "question,reply")
    with pytest.raises(UserError, match=r"^data\.columns has the column text twice; rename or delete one"):
        read_conversations(tmp_path / "a.csv", "text, text")
    (tmp_path / "b.jsonl").write_text(json.dumps({"system": "be nice", "messages": CHAT}))
    with pytest.raises(UserError, match="its fields must be texts, or a single one a list of messages"):
        read_conversations(tmp_path / "b.jsonl", "system,messages")


def test_a_file_with_other_columns_is_another_text(tmp_path):
    (tmp_path / "a.csv").write_text("one,two\na,b\nc,d\n")
    sizes = {"data.path": str(tmp_path / "a.csv"), "data.validation_samples": 1, "data.samples": 1}
    for column, text in {"one": "a", "two": "b"}.items():
        config = configure("offline", settings={**sizes, "data.columns": column}, tell=print)
        assert list(load_conversations(config.data, "train").texts()) == [text]


# How it is split


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.jsonl.gz"])
def test_splits_that_are_asked_for(tmp_path, name):
    sizes = {"samples": 4, "validation_samples": 2, "test_samples": 1, "corpus_samples": 3}
    data = DataConfig(source="file", path=_jsonl(tmp_path, 10, name), table="cooccurrence", **sizes)
    splits = {"train": range(1, 5), "test": [5], "corpus": [6, 7, 8], "validation": [9, 10]}
    for split, numbers in splits.items():
        assert load_conversations(data, split).ids == tuple(f"jsonl:{n}" for n in numbers)
    assert load_conversations(replace(data, test_samples=0), "test").ids == ()
    assert next(load_conversations(data, "train").texts()) == "hello 1\né 你好"


def test_splits_larger_than_the_file_are_refused_with_the_true_cause(tmp_path):
    sizes = {"samples": 5, "validation_samples": 2, "test_samples": 1, "corpus_samples": 3}
    data = DataConfig(source="file", path=_jsonl(tmp_path, 10), table="cooccurrence", **sizes)
    said = (
        r"chats.jsonl has 10 conversations, but 5 for training \(data.samples\) \+ 2 for validation "
        r"\(data.validation_samples\) \+ 1 for the test \(data.test_samples\) "
        r"\+ 3 for the token table \(data.corpus_samples\) are asked for; "
    )
    with pytest.raises(UserError, match=said):
        load_conversations(data, "train")


def _fitted(path: str, settings: dict | None = None, preset: str = "offline", samples: int | None = None):
    said: list[str] = []
    config = configure(preset, None, samples, {"data.path": path, **(settings or {})}, said.append)
    return config, said


def test_sizes_that_are_not_asked_for_fit_the_file(tmp_path):
    path = _jsonl(tmp_path, 40)
    window = {"model.max_contexts": 1, "model.interval": 1}
    config, said = _fitted(path, window)
    data = config.data
    assert (data.source, data.samples, data.validation_samples, data.test_samples) == ("file", 32, 4, 4)
    (line,) = said
    assert f"{path}: 40 conversations, 32 for training, 4 for validation, 4 for the test" in line
    assert "1,000 of chitchat-dataset and all of these but validation and test" in line
    assert compared_samples(config) == (6, 32)
    assert compared_samples(_fitted(path)[0]) == (23, 23)  # nothing less would fill two windows
    assert configure("offline") == build_config("offline")  # presets are left alone
    # A validation text holds two windows, but at most a third of the file.
    assert _fitted(path)[0].data.validation_samples == 13
    window["model.max_contexts"] = len("hello 40") + len("é 你好")  # two windows are eight conversations
    assert _fitted(path, window)[0].data.validation_samples == 8
    data = _fitted(_jsonl(tmp_path, 1010), window)[0].data
    assert (data.validation_samples, data.test_samples) == (100, 100)  # at most


def test_the_token_table_sees_no_validation_text_and_is_one_for_all_sizes(tmp_path):
    config, _ = _fitted(_jsonl(tmp_path, 40), {"data.corpus_samples": 5, "data.corpus": "chitchat+own"})
    rows = load_conversations(config.data, "corpus").ids
    own = {name for name in rows if name.startswith("jsonl:")}
    assert len(rows) == 5 + len(own)
    assert own == {*load_conversations(config.data, "train").ids}  # so nothing of validation and test
    assert load_conversations(config.replace({"data.samples": 3}).data, "corpus").ids == rows


@pytest.mark.parametrize("preset", ["offline", "colab"])
def test_sizes_that_are_asked_for_stay(tmp_path, preset):
    path = _jsonl(tmp_path, 40)
    config, _ = _fitted(path, {"data.validation_samples": "3"}, preset, samples=20)
    assert (config.data.samples, config.data.validation_samples) == (20, 3)
    everything = {"data.source": "file", "data.validation_samples": 3, "data.test_samples": 2}
    everything["data.table"] = "random"
    config, said = _fitted(path, everything, preset, samples=20)
    assert said == []
    assert config == build_config(preset, None, 20, {"data.path": path, **everything})
    with pytest.raises(UserError, match=r"38 for training .* \+ 3 for validation"):
        load_conversations(_fitted(path, {"data.validation_samples": 3}, preset, 38)[0].data, "train")
    with pytest.raises(UserError, match="has 40 conversations, but 500 for training"):
        configure(preset, None, 500, {"data.path": path}, said.append)
    assert said == []  # a split that does not fit is not described as if it did


@pytest.mark.parametrize(
    ("settings", "samples", "test"),
    [
        ({}, 25, 4),
        ({}, 36, 1),
        ({}, 37, 0),
        ({"data.test_samples": 7}, 20, 7),
        ({"data.test_samples": 0}, 20, 0),
    ],
)
def test_the_test_takes_a_tenth_of_what_training_leaves(tmp_path, settings, samples, test):
    settings = {"data.validation_samples": 3, **settings}
    assert _fitted(_jsonl(tmp_path, 40), settings, samples=samples)[0].data.test_samples == test
    rest, _ = _fitted(_jsonl(tmp_path, 40), settings)
    assert rest.data.samples == 37 - rest.data.test_samples


def test_a_file_of_one_conversation_cannot_be_split(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "one.txt").write_text("Hello?\nYes.")
    ends = {_jsonl(tmp_path, 1): r"\.", "~/one.txt": "; a blank line separates"}
    for path, end in ends.items():
        with pytest.raises(UserError, match=f"has 1 conversation; at least 2 are needed .* validate{end}"):
            _fitted(path)
    assert _fitted(_jsonl(tmp_path, 2))[0].data.samples == 1


def test_the_command_of_a_run_works_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _jsonl(tmp_path, 9)
    words = run_command(_fitted("chats.jsonl")[0], Path("run")).split()
    assert f"data.path={tmp_path / 'chats.jsonl'}" in words
    own = _fitted("chats.jsonl", {"data.corpus_samples": 3})[0]
    assert "data.corpus=own" in run_command(own, Path("run")).split()
    Path("chats.jsonl").unlink()  # where it is not, it is named as it was
    assert "data.path=chats.jsonl" in run_command(own, Path("run")).split()


# The copy that is kept of it


@pytest.mark.parametrize("start", [0, 2, 5])
@pytest.mark.parametrize("stop", [0, 3, 6, 99])
def test_slices_are_those_of_a_list(tmp_path, monkeypatch, start, stop):
    monkeypatch.setattr(rows, "PIECE_ROWS", 3)
    kept, wanted = local_files.kept_file(Path(_jsonl(tmp_path, 8))), slice(start, stop)
    everything = list(kept)
    assert (len(kept), len(everything)) == (8, 8)
    assert list(kept[wanted]) == everything[wanted]
    assert len(kept[wanted]) == len(everything[wanted])
    assert list(kept[1:][wanted] + kept[wanted]) == everything[1:][wanted] + everything[wanted]


def test_a_file_is_read_once_while_it_is_the_same(tmp_path, monkeypatch):
    path = Path(_jsonl(tmp_path, 8))
    first = read_conversations(path)
    path.rename(tmp_path / "moved.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(local_files, "read_rows", None)
        assert read_conversations(tmp_path / "moved.jsonl") == first
    _jsonl(tmp_path, 9)
    assert len(read_conversations(path)) == 9
    packed = Path(_jsonl(tmp_path, 1, "chats.jsonl.gz"))
    assert read_conversations(packed).ids == ("jsonl:1",)
    assert read_conversations(packed.rename(tmp_path / "chats.txt.gz")).ids == ("txt:1",)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path, read = Path(_jsonl(tmp_path, 8)), local_files.read_rows

    def grow(*arguments):
        yield from read(*arguments)
        _jsonl(tmp_path, 9)

    monkeypatch.setattr(local_files, "read_rows", grow)
    with pytest.raises(UserError, match=r"chats\.jsonl changed while it was read; run again"):
        read_conversations(path)
    assert not list(cache_dir().glob("*file-*"))
    assert len(read_conversations(path)) == 9
