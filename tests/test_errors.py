import pytest
from IPython.core.interactiveshell import InteractiveShell

from ctxkv_lib.errors import Stopped, UserError


@pytest.mark.parametrize("error", [Stopped(), UserError("preset is 'moon'; allowed: colab.")], ids=repr)
def test_a_notebook_shows_one_line_and_no_frames(monkeypatch, error):
    shown = []
    shell = InteractiveShell()
    monkeypatch.setattr(shell, "_showtraceback", lambda kind, value, lines: shown.append(lines))
    shell.user_ns["error"] = error
    result = shell.run_cell("raise error")
    assert result.error_in_exec is error  # so that no later cell runs
    assert shown == [[str(error)]]
