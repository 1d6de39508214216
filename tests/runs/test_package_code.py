"""Which code a run was made with: a key, another one if the method is patched, and the commit."""

import functools
import importlib
import json
import pathlib

import pytest
from conftest import in_python
from ctxkv_lib.runs.package_code import code_key, code_with_imports

from ctxkv_lib.method import model, oacd
from ctxkv_lib.method.config import Phase1Config
from ctxkv_lib.method.model import ContextBlock, ContextKV
from ctxkv_lib.runs import package_code, provenance


def test_which_modules_are_loaded_makes_no_other_code():
    for file in pathlib.Path(model.__file__).parent.glob("*.py"):
        importlib.import_module(f"ctxkv_lib.method.{file.stem}")
    fresh = in_python("from ctxkv_lib.runs.package_code import code_key; print(code_key())")
    assert fresh.strip() == code_key()


def without_spread(contexts, centroid_weight, scale=1.0):
    centroid = contexts.mean(dim=0)
    return scale * centroid.square().sum(), scale * 2 * centroid.expand_as(contexts) / len(contexts)


def wrapped(original, factor):
    @functools.wraps(original)
    def more(*arguments):
        return original(*arguments) * factor

    return more


PATCHES = [
    (oacd, "oacd_loss", wrapped(oacd.oacd_loss, 2)),
    (oacd, "draw_contexts", without_spread),  # defined in another module
    (model, "CONTEXT_WEIGHT_STD", 1.0),
    (ContextBlock, "forward", lambda self, contexts, inputs: inputs),
    (ContextBlock, "forward", lambda self, contexts, inputs: contexts),
    (ContextKV, "current_token_bias", property(lambda self: 3.0)),
    (Phase1Config, "__post_init__", lambda self: None),
]


def test_whatever_way_the_method_is_patched_it_is_other_code(monkeypatch):
    keys = [code_key()]
    for place, name, part in PATCHES:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, part)
            keys.append(code_key())
    assert len({*keys}) == len(keys)
    assert code_key() == keys[0]


@pytest.mark.parametrize("digested", [code_key, lambda: code_with_imports("runs/testing")])
def test_code_that_reads_rows_and_copies_is_in_the_keys_of_training_and_test(digested, monkeypatch):
    keys, code_of = [digested()], package_code._code_of
    for changed in ("runs/rows.py", "hf/copying_streams.py"):

        def other(file, changed=changed):
            source, imports = code_of(file)
            return source + "changed" * file.as_posix().endswith(changed), imports

        monkeypatch.setattr(package_code, "_code_of", other)
        keys.append(digested())
    assert len({*keys}) == 3


@pytest.mark.parametrize(
    ("recorded", "commit"),
    [
        ({"url": "https://github.com/a/b", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "abc"),
        ({"url": "file:///home/b", "dir_info": {}}, None),
        (None, None),
    ],
)
def test_the_commit_of_a_package_that_pip_installed_is_its_own_record(
    monkeypatch, tmp_path, recorded, commit
):
    folder = tmp_path / "ctxkv_lib-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: ctxkv_lib\nVersion: 0.1.0\n")
    if recorded:
        (folder / "direct_url.json").write_text(json.dumps(recorded))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "ctxkv_lib")
    assert provenance.git_commit() == commit
