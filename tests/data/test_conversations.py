"""UltraChat and chitchat-dataset as sources: which rows, what is transferred, what is refused."""

import errno
import io
import json
import shutil
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hub_standin import direct_to, forget_connections

from ctxkv_lib.data import chitchat as chitchat_source
from ctxkv_lib.data import ultrachat
from ctxkv_lib.data.conversations import load_conversations
from ctxkv_lib.data.hub import ULTRACHAT_REVISION, ULTRACHAT_SHARDS
from ctxkv_lib.data.settings import DataConfig
from ctxkv_lib.errors import UserError

pytestmark = pytest.mark.usefixtures("own_cache")

FILLER = "x" * 40  # makes a row group larger than the shard's footer
REFUSED = r"could not be read from the Hugging Face Hub .* use --preset offline\.$"


def _data(split, count, source="ultrachat"):
    name = "samples" if split == "train" else f"{split}_samples"
    return DataConfig(source=source, **{name: count})


def _load(split, count, source="ultrachat"):
    return load_conversations(_data(split, count, source), split)


def _row(number):
    return [
        {"content": f"question {number} {FILLER}", "role": "user"},
        {"content": f"answer {number}", "role": "assistant"},
    ]


def _numbered(numbers):
    return [(f"ultrachat:train_sft:{n}", _row(n)) for n in numbers]


def _shard_of(rows, group):
    """A Parquet file of numbered rows with UltraChat's columns, of which only `messages` is ever wanted."""
    columns = {"prompt": [f"{FILLER * 5} {n}" for n in rows], "messages": [_row(n) for n in rows]}
    table = pa.table(columns, metadata={"huggingface": '{"info": {"features": {}}}'})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group, compression="none", use_dictionary=False)
    return buffer.getvalue()


@pytest.fixture
def small(hub, monkeypatch):
    """Twenty rows on three shards; 6 to 13 are held back."""
    held_back = {"validation": (range(6, 8),), "test": (range(8, 10),), "corpus": (range(10, 14),)}
    monkeypatch.setattr(ultrachat, "SPLITS", {"train": (range(6), range(14, 20)), **held_back})
    parts = (range(9), range(9, 12), range(12, 20))
    hub.files = {file: _shard_of(rows, 4) for file, rows in zip(ULTRACHAT_SHARDS, parts, strict=True)}
    return hub


@pytest.mark.parametrize(
    ("split", "first", "available"),
    [("train", 0, 201_865), ("validation", 50_000, 500), ("test", 50_500, 500), ("corpus", 51_000, 5000)],
)
def test_ultrachat_gives_the_published_rows_and_says_how_many_there_are(hub, split, first, available):
    hub.status = 500  # the numbers of the pinned commit are known without it
    assert ultrachat.row_numbers(_data(split, 20), split) == [range(first, first + 20)]
    with pytest.raises(UserError, match=f"has only {available} conversations for {split}; lower data"):
        _load(split, available + 1)


def test_ultrachat_transfers_one_row_group_of_one_column(hub):
    shard = hub.files[ULTRACHAT_SHARDS[0]] = _shard_of(range(20_000), 1000)
    _load("train", 20)
    metadata = pq.ParquetFile(io.BytesIO(shard)).metadata.row_group(0)
    columns = [metadata.column(i) for i in range(metadata.num_columns)]
    column = sum(c.total_compressed_size for c in columns if c.path_in_schema.startswith("messages"))
    footer = int.from_bytes(shard[-8:-4], "little") + 8
    guessed = 64 * 1024  # pyarrow guesses the footer's size, then reads what is missing of it
    assert column < hub.sent <= column + guessed + 2 * footer < len(shard) / 20


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("split", "count", "expected"),
    [
        ("train", 12, [*range(6), *range(14, 20)]),
        ("train", 7, [*range(6), 14]),
        ("validation", 2, [6, 7]),
        ("test", 2, [8, 9]),  # the last row of a shard and the first of the next
        ("corpus", 4, [10, 11, 12, 13]),
    ],
)
def test_row_numbers_run_on_over_shards(split, count, expected):
    assert list(_load(split, count).rows) == _numbered(expected)


def test_only_row_groups_that_are_not_there_yet_are_fetched(small, tmp_path):
    _load("train", 8)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/rows-*")}
    assert {path.name for path in kept} == {f"rows-{rows}" for rows in ("0-4", "4-8", "12-16")}
    for path in kept:  # whose texts together may have more than 2 GiB
        columns = Dataset.from_file(str(path / "rows.arrow")).features
        assert str(columns).count("'large_string'") == 3
    (left_over := kept.popitem()[0].parent / ".rows-0-4.1.part").touch()
    sent = small.sent
    more = _load("train", 12)
    assert not left_over.exists()
    fresh = small.sent - sent
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    shutil.rmtree(tmp_path / "cache")
    assert _load("train", 12) == more
    assert fresh < small.sent - sent - fresh
    small.status = 500  # from here on the Hub is of no use
    assert list(_load("train", 8).rows) == list(more.rows[:8])
    with pytest.raises(UserError, match=REFUSED):
        _load("test", 2)


def test_a_damaged_local_copy_is_fetched_again(small, tmp_path, capsys, damage):
    first, _ = _load("train", 1), _load("validation", 2)
    copies = tmp_path / "cache" / f"ultrachat-{ULTRACHAT_REVISION[:12]}"
    damage(copies / "rows-0-4" / "rows.arrow")
    assert _load("train", 1) == first
    assert "rows-0-4 cannot be used" in capsys.readouterr().err
    shutil.rmtree(copies / "rows-0-4")
    shutil.copytree(copies / "rows-4-8", copies / "rows-0-4")
    assert _load("train", 1) == first
    small.status = 500
    assert _load("train", 1) == first


@pytest.mark.parametrize("cause", [200, 403, 404, 429, 503, "no network", "offline mode"])
def test_what_the_hub_does_not_give_names_the_offline_preset(hub, monkeypatch, cause):
    if cause == "no network":
        direct_to("http://127.0.0.1:9", monkeypatch)  # where nobody listens
    elif cause == "offline mode":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        forget_connections()
    else:
        hub.status = cause
    with pytest.raises(UserError, match=REFUSED):
        _load("train", 1)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>sign in to this network</html>",
        _shard_of(range(9), 9)[:-4],
        _shard_of(range(9), 9).replace(b"answer", b"\xff" * 6),
    ],
)
def test_a_damaged_shard_is_refused(hub, body):
    hub.files[ULTRACHAT_SHARDS[0]] = body
    with pytest.raises(UserError, match=REFUSED):
        _load("train", 1)


def test_a_full_disk_is_no_error_of_the_hub(small, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(ultrachat, "keep_rows", Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left"):
        _load("train", 1)


@pytest.fixture
def chitchat(tmp_path, monkeypatch):
    """Install a `chitchat_dataset` package that holds the given conversations."""

    def install(dataset):
        package = tmp_path / "packages" / "chitchat_dataset"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('never import it: it opens files itself')")
        (package / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
        monkeypatch.syspath_prepend(package.parent)

    return install


def _chat(*texts):
    """Two senders in turn; a list is one sender's utterances in a row."""
    turns = [[text] if isinstance(text, str) else text for text in texts]
    return {"messages": [[{"text": u, "sender": "ab"[i % 2]} for u in t] for i, t in enumerate(turns)]}


ENGLISH = ["WHAT DID YOU DO TODAY?", "I WENT TO THE SHOP WITH MY MOM", "that is what i did", "so did she"]
SPANISH = ["what, que haces hoy?", "nada en especial y tu", "voy al cine con mi hermana", "muy bien"]


def test_chitchat_keeps_what_is_usable(chitchat, monkeypatch):
    monkeypatch.setattr(chitchat_source, "HELD_BACK", {"corpus": range(0)})
    chitchat(
        {
            "good": _chat(["WHAT DID YOU", " DO TODAY? "], *ENGLISH[1:]),
            "short": _chat(*ENGLISH[:3]),
            "blank": _chat(*ENGLISH[:3], [" ", ""]),
            "smileys": _chat("🙂", "!", "🙂🙂", "?"),
            "mail": _chat(*ENGLISH, "write to me at someone@example.com"),
            "phone": _chat(*ENGLISH, "call me at (555) 010-9999"),
            "spanish": _chat(*SPANISH),
        }
    )
    ((name, messages),) = _load("train", 1, "chitchat").rows
    assert name == "chitchat:good"
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    assert [m["content"] for m in messages] == ENGLISH
    with pytest.raises(UserError, match="chitchat-dataset has only 1 conversations for train"):
        _load("train", 2, "chitchat")


def test_chitchat_blocks_do_not_move(chitchat):
    chitchat({f"{n}": _chat(*ENGLISH) for n in range(1110)})
    most = {"train": 10, "validation": 50, "test": 50, "corpus": 1000}
    splits = {split: _load(split, count, "chitchat").ids for split, count in most.items()}
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == 1110
    assert splits["validation"][:2] == ("chitchat:1039", "chitchat:886")  # by SHA-256
    for split, count in most.items():
        assert _load(split, 3, "chitchat").ids == splits[split][:3]
        with pytest.raises(UserError, match=f"has only {count} conversations"):
            _load(split, count + 1, "chitchat")


def test_installed_chitchat_is_as_large_as_documented():
    pytest.importorskip("chitchat_dataset")
    rows = _load("train", 2000, "chitchat")
    assert len(set(rows.ids)) == 2000
    assert 3000 < sum(map(len, rows.texts())) / len(rows) < 4500  # characters; about 920 GPT-2 tokens
