"""Splits: which rows of UltraChat and chitchat-dataset they take, and how a user's own data is split."""

import io
import json
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_standin import direct_to, forget_connections

from ctxkv_lib.data import chitchat as chitchat_source
from ctxkv_lib.data import ultrachat
from ctxkv_lib.data.config import DataConfig
from ctxkv_lib.data.conversations import Conversations, check_splits, load_conversations
from ctxkv_lib.data.hub import ULTRACHAT
from ctxkv_lib.data.texts import read_texts
from ctxkv_lib.errors import UserError
from ctxkv_lib.runs.config import config_from_dict
from ctxkv_lib.runs.presets import build_config

pytestmark = pytest.mark.usefixtures("own_store")
REFUSED = r"could not be read from the Hugging Face Hub .* use --preset offline\.$"


def _data(split, count, source="ultrachat"):
    name = "samples" if split == "train" else f"{split}_samples"
    return DataConfig(source=source, **{name: count})


def _load(split, count, source="ultrachat"):
    return load_conversations(_data(split, count, source), split).texts


def _shard_of(rows, group=4):
    """Return a Parquet file with numbered rows and UltraChat's columns."""
    messages = [
        [{"content": f"question {n}", "role": "user"}, {"content": "yes", "role": "no"}] for n in rows
    ]
    file = io.BytesIO()
    pq.write_table(pa.table({"prompt": [*map(str, rows)], "messages": messages}), file, row_group_size=group)
    return file.getvalue()


def _serve(hub, *bodies):
    hub.files = {(*ULTRACHAT, shard): body for shard, body in zip(ultrachat.SHARDS, bodies, strict=False)}


@pytest.mark.parametrize(
    ("split", "first", "available"),
    [("train", 0, 201_865), ("validation", 50_000, 500), ("test", 50_500, 500), ("corpus", 51_000, 5000)],
)
def test_ultrachat_gives_the_published_rows_and_says_how_many_there_are(split, first, available):
    assert ultrachat.row_numbers(split, 20) == [*range(first, first + 20)]
    with pytest.raises(UserError, match=f"has only {available} conversations for {split}; lower data"):
        _load(split, available + 1)
    assert ultrachat.row_numbers("train", 50_001)[-1] == 56_000


@pytest.fixture
def small(hub, monkeypatch):
    """Serve twenty rows in three shards in place of UltraChat. Rows 6 to 13 are not used for training."""
    held_back = {"validation": (range(6, 8),), "test": (range(8, 10),), "corpus": (range(10, 14),)}
    monkeypatch.setattr(ultrachat, "SPLITS", {"train": (range(6), range(14, 20)), **held_back})
    _serve(hub, _shard_of(range(9)), _shard_of(range(9, 12)), _shard_of(range(12, 20)))
    return hub


@pytest.mark.parametrize(
    ("split", "count", "expected", "shards"),
    [
        ("train", 12, [*range(6), *range(14, 20)], 3),
        ("train", 6, [*range(6)], 1),
        ("validation", 2, [6, 7], 1),
        ("test", 2, [8, 9], 2),  # the last row of one shard and the first of the next
        ("corpus", 4, [10, 11, 12, 13], 3),
    ],
)
def test_a_split_may_span_shards_which_are_cached_whole(small, split, count, expected, shards):
    assert _load(split, count) == [f"question {n}\nyes" for n in expected]
    assert small.served == [*ultrachat.SHARDS[:shards]]
    small.status = 500  # from here on, the Hub fails
    assert _load(split, count - 1) == [f"question {n}\nyes" for n in expected[:-1]]


@pytest.mark.parametrize("cause", [200, 403, 404, 429, 503, "no network", "offline mode"])
def test_a_failed_download_suggests_the_offline_preset(hub, monkeypatch, cause):
    if cause == "no network":
        direct_to("http://127.0.0.1:9", monkeypatch)  # nothing listens there
    elif cause == "offline mode":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        forget_connections()
    else:
        hub.status = cause
    with pytest.raises(UserError, match=REFUSED) as refused:
        _load("train", 1)
    assert ("; unset HF_HUB_OFFLINE, check the network" in str(refused.value)) == (cause == "offline mode")
    check_splits(DataConfig())  # this check needs no Hub


@pytest.mark.parametrize("damage", [lambda body: body[:-4], lambda body: body.replace(b"qu", b"\xff\xff")])
def test_a_damaged_shard_is_refused(hub, damage):
    _serve(hub, damage(_shard_of([1])))
    with pytest.raises(UserError, match=r"a3ecf92756993583\.parquet is damaged \(.*\); delete it and run"):
        _load("train", 1)


@pytest.fixture
def chitchat(tmp_path, monkeypatch):
    """Return a function that replaces the conversations of `chitchat-dataset`."""

    def install(dataset):
        (tmp_path / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
        monkeypatch.setattr(chitchat_source, "package_file", lambda *_: tmp_path / "dataset.json")

    return install


def _chat(*texts):
    """Return a chat in which two senders take turns; a list contains the utterances of one turn."""
    turns = [[text] if isinstance(text, str) else text for text in texts]
    return {"messages": [[{"text": u, "sender": "ab"[i % 2]} for u in t] for i, t in enumerate(turns)]}


ENGLISH = ["WHAT DID YOU DO TODAY?", "I WENT TO THE SHOP WITH MY MOM", "that is what i did", "so did she"]
SPANISH = ["what, que haces hoy?", "nada en especial y tu", "voy al cine con mi hermana", "muy bien"]


def test_chitchat_keeps_only_usable_conversations(chitchat, monkeypatch):
    monkeypatch.setattr(chitchat_source, "HELD_BACK", {"corpus": range(0)})
    mail, phone = "write to me at someone@example.com", "call me at (555) 010-9999"
    refused = [ENGLISH[:3], [*ENGLISH[:3], [" ", ""]], "🙂!🙂?", [*ENGLISH, mail], [*ENGLISH, phone], SPANISH]
    chats = [[["WHAT DID YOU", " DO TODAY? "], *ENGLISH[1:]], *refused]
    chitchat({str(number): _chat(*chat) for number, chat in enumerate(chats)})
    assert _load("train", 1, "chitchat") == ["\n".join(ENGLISH)]
    with pytest.raises(UserError, match="chitchat-dataset has only 1 conversations for train"):
        _load("train", 2, "chitchat")


def test_chitchat_splits_are_disjoint_and_smaller_ones_are_prefixes(chitchat):
    chitchat({f"{n}": _chat(*ENGLISH[:3], f"and i have {n}") for n in range(1110)})
    most = {"train": 10, "validation": 50, "test": 50, "corpus": 1000}
    splits = {split: _load(split, count, "chitchat") for split, count in most.items()}
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == 1110
    assert [text.split()[-1] for text in splits["validation"][:2]] == ["1039", "886"]  # ordered by SHA-256
    for split, count in most.items():
        assert _load(split, 3, "chitchat") == splits[split][:3]
        with pytest.raises(UserError, match=f"has only {count} conversations"):
            _load(split, count + 1, "chitchat")


def _text(number: int) -> str:
    return f"hello {number}\né 你好"


def _jsonl(folder: Path, count: int) -> str:
    lines = [json.dumps({"text": _text(number)}) for number in range(1, count + 1)]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return str(folder / "chats.jsonl")


def _own(folder: Path, **sizes) -> DataConfig:
    return DataConfig(path=_jsonl(folder, 10), table="cooccurrence", **sizes)


SIZES = {"samples": 4, "validation_samples": 2, "test_samples": 1, "corpus_samples": 3}


def test_a_file_is_split_into_the_given_sizes(tmp_path):
    data = _own(tmp_path, **SIZES)
    assert data == replace(data, source="file")
    splits = {"train": range(1, 5), "test": [5], "corpus": [6, 7, 8], "validation": [9, 10]}
    for split, numbers in splits.items():
        assert load_conversations(data, split).texts == [*map(_text, numbers)]
    assert load_conversations(replace(data, test_samples=0), "test").texts == []


def test_a_fingerprint_depends_only_on_the_texts(tmp_path):
    conversations = Conversations.of(read_texts(_jsonl(tmp_path, 2)))
    assert len(conversations) == 2
    (tmp_path / "same.txt").write_text("\n\n".join(map(_text, (1, 2))))
    assert Conversations.of(read_texts(tmp_path / "same.txt")) == conversations
    others = [["a", "b"], ["ab"], ["b", "a"], ["a\nb"], []]
    assert len({Conversations.of(texts).fingerprint for texts in others}) == len(others)


def test_splits_larger_than_the_data_are_refused_with_all_their_sizes(tmp_path):
    said = r"has 10 conversations, but 5 for training \(data.samples\) \+ 2 for validation .* are asked for; "
    for read in (check_splits, lambda data: load_conversations(data, "train")):
        with pytest.raises(UserError, match=said):
            read(_own(tmp_path, **{**SIZES, "samples": 5}))


def _fitted(path: str, settings: dict | None = None, samples: int | None = None):
    """Return a configuration for the user's data, and the printed lines."""
    with redirect_stderr(io.StringIO()) as said:
        config = build_config("offline", None, samples, {"data.path": path, **(settings or {})})
    return config, said.getvalue().splitlines()


def _sizes(*args, **kwargs):
    data = _fitted(*args, **kwargs)[0].data
    return data.samples, data.validation_samples, data.test_samples


def test_sizes_that_are_not_given_are_80_10_and_10_percent(tmp_path):
    path = _jsonl(tmp_path, 40)
    config, (line,) = _fitted(path)
    assert _sizes(path) == (32, 4, 4)
    assert (config.data.source, config.data.corpus) == ("file", "chitchat+own")
    assert f"{path}: 40 conversations, 32 for training, 4 for validation, 4 for the test" in line
    assert "1,000 of chitchat-dataset and all of these for training" in line
    assert _sizes(path, {"data.test_samples": 2}) == (34, 4, 2)
    assert _sizes(path, samples=5) == (5, 4, 4)
    assert _sizes(path, {"data.corpus": "own", "data.corpus_samples": 10}) == (22, 4, 4)
    assert _sizes(_jsonl(tmp_path, 3)) == (1, 1, 1)
    with pytest.raises(UserError, match="has 2 conversations, which is too few to train, validate and test"):
        _fitted(_jsonl(tmp_path, 2))
    assert _sizes(_jsonl(tmp_path, 2), {"data.test_samples": 0}) == (1, 1, 0)


def test_sizes_that_are_given_are_kept(tmp_path):
    asked = {"data.validation_samples": "3", "data.test_samples": 2, "data.table": "random"}
    config, said = _fitted(_jsonl(tmp_path, 40), asked, samples=20)
    assert (config.data.samples, config.data.validation_samples) == (20, 3)
    assert said == []
    assert config == config_from_dict(config.to_dict())


def test_the_token_table_sees_no_validation_text_and_is_the_same_for_all_sizes(tmp_path):
    config, _ = _fitted(_jsonl(tmp_path, 40), {"data.corpus_samples": 5})
    texts = load_conversations(config.data, "corpus").texts
    assert texts[5:] == load_conversations(config.data, "train").texts  # no validation or test texts
    assert load_conversations(config.replace({"data.samples": 3}).data, "corpus").texts == texts


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"source": "file"}, "data.source is 'file' without data.path; name your file"),
        ({"path": ""}, "data.path is ''; allowed: a path"),
        ({"split": "train"}, "data.split is 'train'; allowed: None unless data.path is given"),
        ({"corpus": "chitchat+own"}, "data.corpus is 'chitchat\\+own', which needs data.path; allowed: own"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        DataConfig(**settings)
