from IPython.core.interactiveshell import InteractiveShell

from ctxkv_lib.errors import Stopped


def test_a_notebook_shows_a_stop_as_one_line(monkeypatch):
    shown = []
    shell = InteractiveShell()
    monkeypatch.setattr(shell, "_showtraceback", lambda kind, value, lines: shown.append(lines))
    shell.user_ns["stopped"] = Stopped("Stopped. Epochs 1 to 3 are kept; run the cell again.")
    result = shell.run_cell("raise stopped")
    assert isinstance(result.error_in_exec, KeyboardInterrupt)  # so that no later cell runs
    assert shown == [["Stopped. Epochs 1 to 3 are kept; run the cell again."]]
