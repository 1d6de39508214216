"""A cache of its own for each test of data, and ways to damage what is in it."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTXKV_CACHE", str(tmp_path / "cache"))


def flip(path):
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.fixture(params=[flip, cut])
def damage(request):
    """A function that damages the file at a path."""
    return request.param
