import json

import pytest

from ctxkv_lib.runs import provenance


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
