import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctxkv_lib.data import chitchat as chitchat_source
from ctxkv_lib.data import ultrachat
from ctxkv_lib.data.conversations import READERS, add_source, load_conversations
from ctxkv_lib.data.hub import ULTRACHAT_REVISION, ULTRACHAT_SHARDS
from ctxkv_lib.data.rows import Rows
from ctxkv_lib.data.settings import SOURCES, DataConfig
from ctxkv_lib.errors import UserError

pytestmark = pytest.mark.usefixtures("own_cache")

pytest_plugins = ["hub_standin"]

ROWS = 51_040
GROUP = 1000
FILLER = "x" * 40  # makes a row group larger than the shard's footer


def _row(number: int) -> list[dict[str, str]]:
    return [
        {"content": f"question {number} {FILLER}", "role": "user"},
        {"content": f"answer {number}", "role": "assistant"},
    ]


@pytest.fixture(scope="module")
def shard() -> bytes:
    return _shard_of(range(ROWS), GROUP)


def _shard_of(rows: range, group: int) -> bytes:
    """A Parquet file of numbered rows with UltraChat's columns, of which only `messages` is ever wanted."""
    table = pa.table(
        {
            "prompt": [f"{FILLER * 5} {n}" for n in rows],
            "prompt_id": [str(n) for n in rows],
            "messages": [_row(n) for n in rows],
        },
        metadata={"huggingface": '{"info": {"features": {}}}'},
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group, compression="none", use_dictionary=False)
    return buffer.getvalue()


def _column_bytes(shard: bytes, group: int) -> int:
    """The size of `messages` in one row group."""
    metadata = pq.ParquetFile(io.BytesIO(shard)).metadata.row_group(group)
    columns = [metadata.column(i) for i in range(metadata.num_columns)]
    return sum(c.total_compressed_size for c in columns if c.path_in_schema.startswith("messages"))


@pytest.mark.parametrize(
    ("split", "first", "settings"),
    [
        ("train", 0, {"samples": 3}),
        ("validation", 50_000, {"validation_samples": 20}),
        ("test", 50_500, {"test_samples": 20}),
        ("corpus", 51_000, {"corpus_samples": 5}),
    ],
)
def test_ultrachat_gives_the_published_rows(hub, shard, split, first, settings):
    hub.files[ULTRACHAT_SHARDS[0]] = shard
    rows = load_conversations(DataConfig(**settings), split)
    count = next(iter(settings.values()))
    assert rows.ids == tuple(f"ultrachat:train_sft:{n}" for n in range(first, first + count))
    assert list(rows.messages) == [_row(n) for n in range(first, first + count)]
    assert next(rows.texts()) == f"question {first} {FILLER}\nanswer {first}"


def test_ultrachat_transfers_one_row_group_of_one_column(hub, shard):
    hub.files[ULTRACHAT_SHARDS[0]] = shard
    load_conversations(DataConfig(), "validation")
    footer = 64 * 1024  # pyarrow guesses the footer's size, then reads what is missing of it
    at_most = _column_bytes(shard, 50) + footer + 2 * _footer_bytes(shard)
    assert _column_bytes(shard, 50) < hub.sent <= at_most < len(shard) / 20


def _footer_bytes(shard: bytes) -> int:
    return int.from_bytes(shard[-8:-4], "little") + 8


@pytest.fixture
def small_shards(hub, monkeypatch) -> None:
    """Twenty rows on three shards; 6 to 13 are held back."""
    numbers = {"VALIDATION": range(6, 8), "TEST": range(8, 10), "CORPUS": range(10, 14), "ROWS": 20}
    for name, value in numbers.items():
        monkeypatch.setattr(ultrachat, f"ULTRACHAT_{name}", value)
    parts = (range(9), range(9, 12), range(12, 20))
    hub.files = {file: _shard_of(rows, 4) for file, rows in zip(ULTRACHAT_SHARDS, parts, strict=True)}


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(
    ("split", "settings", "expected"),
    [
        ("train", {"samples": 12}, [*range(6), *range(14, 20)]),
        ("train", {"samples": 7}, [*range(6), 14]),
        ("validation", {"validation_samples": 2}, [6, 7]),
        ("test", {"test_samples": 2}, [8, 9]),  # the last row of a shard and the first of the next
        ("corpus", {"corpus_samples": 4}, [10, 11, 12, 13]),
    ],
)
def test_row_numbers_run_on_over_shards(split, settings, expected):
    rows = load_conversations(DataConfig(**settings), split)
    assert rows.ids == tuple(f"ultrachat:train_sft:{n}" for n in expected)
    assert list(rows.messages) == [_row(n) for n in expected]


@pytest.mark.usefixtures("small_shards")
def test_all_rows_of_all_shards_that_are_not_held_back_are_for_training(hub):
    with pytest.raises(UserError, match="UltraChat has only 12 conversations for train"):
        load_conversations(DataConfig(samples=13), "train")


@pytest.mark.usefixtures("small_shards")
def test_only_row_groups_that_are_not_there_yet_are_fetched(hub, tmp_path):
    load_conversations(DataConfig(samples=8), "train")
    kept = {path.name for path in (tmp_path / "cache").glob("*/rows-*")}
    assert kept == {f"rows-{rows}" for rows in ("0-4", "4-8", "12-16")}
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/rows-*")}
    sent = hub.sent
    more = load_conversations(DataConfig(samples=12), "train")
    assert more.ids[-1] == "ultrachat:train_sft:19"
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    fresh = hub.sent - sent
    shutil.rmtree(tmp_path / "cache")
    before = hub.sent
    assert load_conversations(DataConfig(samples=12), "train") == more
    assert fresh < hub.sent - before


def test_ultrachat_is_read_once(hub, shard):
    hub.files[ULTRACHAT_SHARDS[0]] = shard
    first = load_conversations(DataConfig(samples=500), "train")
    hub.status = 500  # from here on the Hub is of no use
    fewer = load_conversations(DataConfig(samples=100), "train")
    assert fewer.messages == first.messages[:100]
    assert load_conversations(DataConfig(samples=500), "train") == first
    with pytest.raises(UserError, match="use --preset offline"):
        load_conversations(DataConfig(), "validation")


def test_a_damaged_local_copy_is_fetched_again(hub, shard, tmp_path, capsys, damage):
    hub.files[ULTRACHAT_SHARDS[0]] = shard
    data = DataConfig(samples=1)
    first, _ = load_conversations(data, "train"), load_conversations(data, "validation")
    copies = tmp_path / "cache" / f"ultrachat-{ULTRACHAT_REVISION[:12]}"
    damage(copies / "rows-0-1000" / "rows.arrow")
    assert load_conversations(data, "train") == first
    assert "rows-0-1000 cannot be used" in capsys.readouterr().err
    shutil.rmtree(copies / "rows-0-1000")
    shutil.copytree(copies / "rows-50000-51000", copies / "rows-0-1000")
    assert load_conversations(data, "train") == first
    hub.status = 500
    assert load_conversations(data, "train") == first


@pytest.mark.parametrize(
    ("split", "settings", "available"),
    [
        ("train", {"samples": 201_866}, 201_865),
        ("validation", {"validation_samples": 501}, 500),
        ("test", {"test_samples": 501}, 500),
        ("corpus", {"corpus_samples": 5001}, 5000),
    ],
)
def test_ultrachat_says_how_many_rows_there_are(hub, split, settings, available):
    hub.status = 500  # the numbers of the pinned commit are known without it
    with pytest.raises(UserError, match=f"has only {available} conversations for {split}; lower data"):
        load_conversations(DataConfig(**settings), split)


@pytest.mark.parametrize("status", [403, 404, 429, 503])
def test_refusals_of_the_hub_name_the_offline_preset(hub, status):
    hub.status = status
    with pytest.raises(
        UserError, match=r"could not be read from the Hugging Face Hub .* use --preset offline\.$"
    ):
        load_conversations(DataConfig(), "train")


@pytest.mark.usefixtures("no_hub")
def test_no_network_names_the_offline_preset():
    with pytest.raises(UserError, match=r"could not be read .* use --preset offline\.$"):
        load_conversations(DataConfig(), "train")


def test_offline_mode_names_the_offline_preset(tmp_path):
    program = (
        "from ctxkv_lib.data.settings import DataConfig\n"
        "from ctxkv_lib.data.conversations import load_conversations\n"
        "from ctxkv_lib.errors import UserError\n"
        "try: load_conversations(DataConfig(), 'train')\n"
        "except UserError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "could not be read from the Hugging Face Hub" in done.stdout
    assert done.stdout.strip().endswith("or use --preset offline.")


def test_importing_is_light():
    program = "import sys, ctxkv_lib.data.conversations; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "datasets", "pyarrow", "huggingface_hub", "transformers"} & set(done.stdout.split())


@pytest.fixture
def chitchat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install a `chitchat_dataset` package that holds the given conversations."""

    def install(dataset: dict[str, Any]) -> None:
        package = tmp_path / "packages" / "chitchat_dataset"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('never import it: it opens files itself')")
        (package / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
        monkeypatch.syspath_prepend(package.parent)

    return install


def _chat(*texts: str | list[str]) -> dict[str, Any]:
    """Two senders in turn; a list is one sender's utterances in a row."""
    turns = [[text] if isinstance(text, str) else text for text in texts]
    return {"messages": [[{"text": u, "sender": "ab"[i % 2]} for u in t] for i, t in enumerate(turns)]}


ENGLISH = ["what did you do today?", "i went to the shop with my mom", "that is what i did", "so did she"]


def test_chitchat_keeps_what_is_usable(chitchat, monkeypatch):
    monkeypatch.setattr(chitchat_source, "CHITCHAT_VALIDATION", range(0))
    monkeypatch.setattr(chitchat_source, "CHITCHAT_CORPUS", range(0))
    chitchat(
        {
            "good": _chat(["what did you", " do today? "], *ENGLISH[1:]),
            "short": _chat(*ENGLISH[:3]),
            "blank": _chat(*ENGLISH[:3], " "),
            "mail": _chat(*ENGLISH, "write to me at someone@example.com"),
            "phone": _chat(*ENGLISH, "call me at (555) 010-9999"),
            "spanish": _chat(
                "que haces hoy?", "nada en especial y tu", "voy al cine con mi hermana", "muy bien"
            ),
        }
    )
    rows = load_conversations(DataConfig(source="chitchat", samples=1), "train")
    assert rows.ids == ("chitchat:good",)
    assert [m["role"] for m in rows.messages[0]] == ["user", "assistant", "user", "assistant"]
    assert [m["content"] for m in rows.messages[0]] == ENGLISH
    with pytest.raises(UserError, match="chitchat-dataset has only 1 conversations for train"):
        load_conversations(DataConfig(source="chitchat", samples=2), "train")


def test_chitchat_blocks_do_not_move(chitchat):
    chitchat({f"{n}": _chat(*ENGLISH) for n in range(1110)})

    def ids(split: str, count: int) -> tuple[str, ...]:
        sizes = dict.fromkeys(("samples", *(f"{name}_samples" for name in most if name != "train")), count)
        return load_conversations(DataConfig(source="chitchat", **sizes), split).ids

    most = {"train": 10, "validation": 50, "test": 50, "corpus": 1000}
    splits = [set(ids(split, count)) for split, count in most.items()]
    assert sum(len(s) for s in splits) == len(set.union(*splits)) == 1110
    for split, count in most.items():
        assert ids(split, 3) == ids(split, 9)[:3]
        with pytest.raises(UserError, match=f"has only {count} conversations"):
            ids(split, count + 1)


def test_chitchat_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="run: pip install chitchat-dataset"):
        load_conversations(DataConfig(source="chitchat"), "train")


def test_installed_chitchat_is_as_large_as_documented():
    pytest.importorskip("chitchat_dataset")
    rows = load_conversations(DataConfig(source="chitchat", samples=2000), "train")
    assert len(set(rows.ids)) == 2000
    characters = sum(len(text) for text in rows.texts()) / len(rows)
    assert 3000 < characters < 4500  # about 920 GPT-2 tokens


def test_a_source_of_a_plug_in_is_read_and_named_as_allowed():
    with pytest.raises(ValueError, match=r"data.source is 'mine'; allowed: [\w, ]+\."):
        DataConfig(source="mine")
    add_source("mine", "for a test", lambda data, split: Rows.held([(split, [])] * data.count(split)))
    try:
        assert load_conversations(DataConfig(source="mine", samples=2), "train").ids == ("train", "train")
        with pytest.raises(ValueError, match=r"data\.source is 'other'; allowed: .*, mine"):
            DataConfig(source="other")
    finally:
        del SOURCES["mine"], READERS["mine"]
