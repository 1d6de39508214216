"""A user's own conversations: which formats are recognized, and how errors name the faulty place."""

import csv
import gzip
import json
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import in_python
from hub_standin import MAIN

from ctxkv_lib.data.texts import read_texts
from ctxkv_lib.errors import UserError

CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "é 你好"}]
TEXT = "Hello?\né 你好"


def chatgpt(*nodes, current_node=None):
    """Return a ChatGPT export with nodes (name, parent, role, parts) and, optionally, more message fields."""
    mapping = {}
    for name, parent, role, parts, *more in nodes:
        message = {"author": {"role": role}, "content": {"parts": parts}, **dict(*more)}
        mapping[name] = {"id": name, "parent": parent, "message": role and message}
    return {"title": "A chat", "mapping": mapping, "current_node": current_node or nodes[-1][0]}


EXPORT = [
    ("root", None, None, None),
    ("rules", "root", "system", [""]),
    ("a", "rules", "user", ["Hello?"]),
    ("b", "a", "assistant", ["no"]),  # replaced by a second answer
    ("c", "a", "assistant", ["é 你好"]),
]
RECORDS = {
    "OpenAI": {"prompt": "no", "messages": CHAT},
    "OpenAI with a score": {"messages": [{**turn, "value": "good"} for turn in CHAT]},
    "ShareGPT": {"id": 1, "conversations": [{"from": "human", "value": m["content"]} for m in CHAT]},
    "Alpaca with input": {"instruction": "Add.", "input": "1 1", "output": "2", "whole": "Add.\n1 1\n2"},
    "Alpaca": {"instruction": "Hello?", "input": "", "output": "é 你好"},
    "Alpaca without input": {"instruction": "Hello?", "input": None, "output": "é 你好"},
    "Alpaca without the field input": {"instruction": "Hello?", "output": "é 你好"},
    "responses": {"prompt": "Hello?", "response": "é 你好", "n": 1},
    "completions": {"prompt": "Hello?", "completion": "é 你好"},
    "questions": {"question": "Hello?", "answer": "é 你好", "text": "no"},
    "text": {"text": TEXT, "content": "no"},
    "ChatGPT": chatgpt(*EXPORT),
    "Claude": {"name": "", "chat_messages": [{"sender": "human", "text": m["content"]} for m in CHAT]},
}


def test_a_file_that_changes_and_keeps_its_size_is_read_again(tmp_path):
    file = tmp_path / "chats.txt"
    for number, text in enumerate(("a cat", "a dog")):
        file.write_text(text)
        os.utime(file, (number, number))
        assert read_texts(file) == [text]


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_every_form_is_read_from_json_and_parquet(tmp_path, record):
    line = json.dumps(record)
    (tmp_path / "a.v2.jsonl").write_text(f"{line}\n\n{line}\n  ")
    (tmp_path / "b.json").write_text(f"\n [{line},\n{line}]")
    (tmp_path / "c.ndjson").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}".encode())
    (tmp_path / "D.JSON.GZ").write_bytes(gzip.compress(f"{line}\n{line}".encode()))
    pq.write_table(pa.Table.from_pylist([record] * 2), tmp_path / "e.parquet")
    files = [*tmp_path.iterdir()]
    expected = record.get("whole", TEXT)
    assert {file.name: read_texts(file) for file in files} == {file.name: [expected] * 2 for file in files}


def test_an_export_is_read_in_its_final_version(tmp_path):
    picture, call = {"content_type": "image_asset_pointer", "asset_pointer": "x"}, {"recipient": "python"}
    hidden = {"metadata": {"is_visually_hidden_from_conversation": True}, "recipient": "all"}
    branch = [
        ("d", "c", "user", [picture, "What is this?", " And that?"]),
        ("e", "d", "assistant", ["print(1)"], call),
        ("f", "e", "tool", ["1"]),
        ("g", "f", "user", ["secret"], hidden),
        ("h", "g", "assistant", None),  # messages with thoughts have no parts
        ("i", "h", "assistant", ["One."], {"metadata": None}),
    ]
    search = [{"type": "tool_use", "name": "search"}, {"type": "text", "text": "Found."}, {"text": None}]
    said = [{"text": "Look.", "content": []}, {"text": "not supported", "content": search}, {"text": ""}]
    chats = [chatgpt(*EXPORT, *branch), chatgpt(*EXPORT[:2]), {"chat_messages": said}, {"chat_messages": []}]
    (tmp_path / "conversations.json").write_text(json.dumps(chats, indent=1))
    assert read_texts(tmp_path / "conversations.json") == [
        f"{TEXT}\nWhat is this?\n And that?\nOne.",  # empty chats, which every export has, are left out
        "Look.\nFound.",
    ]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (chatgpt(*EXPORT, current_node="z"), r"mapping and current_node must be as ChatGPT .*KeyError: 'z'"),
        (chatgpt(("a", "a", "user", ["b"])), "mapping and current_node must be as ChatGPT exports them"),
        ({"chat_messages": [{"sender": "human"}]}, "chat_messages must be as Claude exports them"),
        ({"messages": [{"content": [{"type": "text", "text": 3}]}]}, "messages must be a list of"),
        ({"messages": [{"content": [{"type": "image_url"}]}]}, "is an empty conversation"),
    ],
)
def test_an_error_in_a_damaged_export_names_the_file_and_the_item(tmp_path, record, said):
    (tmp_path / "conversations.json").write_text(json.dumps([RECORDS["ChatGPT"], record]))
    with pytest.raises(UserError, match=rf"conversations\.json, item 2:? {said}"):
        read_texts(tmp_path / "conversations.json")


@pytest.mark.parametrize(
    ("name", "separator", "end"),
    [("a.csv", ",", "\r\n"), ("b.csv", ";", "\n"), ("c.tsv", "\t", "\n"), ("d.csv.gz", "\t", "\r\n")],
)
def test_csv_and_tsv_files_are_read(tmp_path, name, separator, end):
    long = "b, c" * 50_000  # longer than the csv module's default limit
    rows = [["id", "Answer", "QUESTION"], [1, "please;", 'Say "hi",\n'], [2, "\tThen go.", long]]
    with (tmp_path / "plain").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator, lineterminator=end).writerows(rows)
    raw = (tmp_path / "plain").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert read_texts(tmp_path / name) == ['Say "hi",\n\nplease;', f"{long}\n\tThen go."]


def test_cells_that_excel_leaves_empty_are_no_error(tmp_path):
    (tmp_path / "a.csv").write_text("id;text;;\n1;a, b, c, d;;\n")
    assert read_texts(tmp_path / "a.csv") == ["a, b, c, d"]


def test_plain_text_is_cut_at_blank_lines(tmp_path):
    path = tmp_path / "talk.txt"
    path.write_bytes("\r\n\r\n\t Hello? \r\n é 你好 \f\r\n \t\r\n\r\nYes.\n\f\n\u00a0Good bye. ".encode())
    assert read_texts(path) == ["Hello? \n é 你好", "Yes.", "Good bye."]


def test_of_parquet_only_the_columns_of_its_form_are_read(tmp_path):
    texts = [f"number {n}" for n in range(203)]
    beyond = pa.array([10**15] * len(texts), pa.timestamp("ms"))  # a year beyond Python's datetime
    pq.write_table(pa.table({"text": texts, "at": beyond}), tmp_path / "texts.parquet", row_group_size=100)
    assert read_texts(tmp_path / "texts.parquet") == texts


def test_all_files_of_a_folder_are_read_in_the_order_of_their_paths(tmp_path):
    for name, text in {"b.txt": "3", "a/2.csv": "text\n2\n", "a/1.jsonl": '{"text": "1"}'}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "b.txt").write_text("a copy")
    assert read_texts(str(tmp_path)) == ["1", "2", "3"]


def test_a_file_that_changes_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    assert read_texts("~/a.txt") == ["one"]
    (tmp_path / "a.txt").write_text("one and two")
    assert read_texts("~/a.txt") == ["one and two"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"not json", r" is not JSON \(Expecting value\); write one record per line"),
        (b"{}", " has no fields; allowed: messages;"),
        (b'{"role": "user", "content": "a"}', " has the fields role, content; allowed: messages; .*; text"),
        (b'{"a\\nfield": null}', r" has the fields a\\nfield; allowed"),  # the message stays on one line
        (b'{"messages": "hello"}', ": messages must be a list"),
        (b'{"messages": [{"content": "a"}, {"content": null}]}', ": messages must be a list"),
        (b'{"instruction": "a", "output": null}', ": instruction and output must be text"),
        (b'{"text": " \\n"}', " is an empty conversation"),
        (b'{"text": "\xff"}', " is not UTF-8"),
        (b'{"text": "\\ud83d"}', r": text must be text \(UnicodeEncodeError: .*surrogates not allowed\)"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, sentence):
    good = json.dumps(RECORDS["text"]).encode()
    (tmp_path / "chats.jsonl").write_bytes(b"\n".join([good, line, good]))
    with pytest.raises(UserError, match=f"chats.jsonl, line 2{sentence}") as raised:
        read_texts(tmp_path / "chats.jsonl")
    assert "\n" not in str(raised.value)


def _parquet(**columns):
    file = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), file)
    return file.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.jsonl", None, " does not exist; name a file "),
        ("blank.jsonl", b"\n \n", " has no conversations; write"),
        ("plain.jsonl.gz", b'{"text": "a"}', " cannot be read"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-10], " cannot be read"),
        ("chats.docx", b"PK", r" has an unknown file type; allowed: \.jsonl, .*\.parquet, all but"),
        ("wide.txt", "hello".encode("utf-16"), ", line 1 is not UTF-8 .*; save it as UTF-8"),
        ("array.json", b'[{"text": "a"}, 3]', ", item 2 is not a record"),
        (
            "pretty.json",
            b'{\n"text": "a"}',
            ", line 1 is not JSON .*; write one record per line, or one array",
        ),
        ("names.csv", b"id,words\n1,hello\n", ", row 1 has the fields id, words; allowed"),
        ("bare.csv", b"text\nhello\nfriend, today\n", " cannot be read as CSV .*; give each row as many"),
        ("open.csv", b'n,text\n1,"a\n2,b\n', " cannot be read as CSV .*EOF inside string.*; give each row"),
        ("bad.parquet", b"PAR1", " cannot be read as Parquet"),
        ("no_utf8.parquet", _parquet(text=pa.array([b"\xff"]).view(pa.string())), " cannot be read as Parq"),
        ("empty.parquet", _parquet(text=["a", None]), ", row 2: text must be text"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / name))}{sentence}"):
        read_texts(tmp_path / name)


def test_missing_conversations_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no conversations; write at least one \(\.jsonl"):
        read_texts(tmp_path)
    with pytest.raises(UserError, match=r"does not exist; .* or a data set on the Hub as owner/name\.$"):
        read_texts("no_such_thing")
    with pytest.raises(UserError, match=r"data\.split is 'train'; allowed: None, unless the data is a"):
        read_texts(tmp_path, "train")


CARD = """---
configs:
- config_name: short
  data_files: [{split: dev, path: short/dev.csv}, {split: check, path: short/check.csv}]
- config_name: long
  data_files: [{split: train_sft, path: data/*.parquet}]
---
"""
READ = """
import sys
from ctxkv_lib.data.texts import read_texts
from ctxkv_lib.errors import UserError
for words in sys.argv[1:]:
    try:
        print(read_texts(*words.split()))
    except UserError as error:
        print(error)
"""


def test_data_sets_on_the_hub_are_read_by_their_name(hub, tmp_path):
    parts = {"train-00000-of-00002": "a", "train-00001-of-00002": "b", "test-00000-of-00001": "c"}
    files = {f"data/{name}.jsonl": json.dumps({"text": text}).encode() for name, text in parts.items()}
    hub.files = {("me/chats", MAIN, path): body for path, body in files.items()}
    files = {"README.md": CARD.encode(), "data/x.parquet": _parquet(text=["long"])}
    files |= {f"short/{name}.csv": f"text\n{name}\n".encode() for name in ("dev", "check")}
    hub.files |= {("me/two", MAIN, path): body for path, body in files.items()}
    here = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    asked = ["me/chats", "me/chats test", "me/chats dev", "me/two:long", "me/two:short dev", "me/two:short"]
    found = in_python(READ, *asked, "me/two", "me/none", env=here, cwd=os.getcwd()).splitlines()
    assert found[:2] == ["['a', 'b']", "['c']"]
    assert found[2] == "me/chats has no split dev; allowed for data.split: train, test."
    assert found[3:5] == ["['long']", "['dev']"]
    assert found[5] == "me/two:short has no split train; allowed for data.split: dev, check."
    assert "me/two is not a file or folder, and could not be opened" in found[6]
    assert "['short', 'long']" in found[6]
    assert "RepositoryNotFoundError" in found[7]
    assert hub.served.count("data/train-00000-of-00002.jsonl") == 1  # huggingface_hub caches the whole file
    offline = in_python(READ, "me/chats", env={**here, "HF_HUB_OFFLINE": "1"})
    assert re.search(r"could not be opened .*; unset HF_HUB_OFFLINE, check the name and the network", offline)
    assert offline.count("\n") == 1
