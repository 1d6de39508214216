from IPython.core.interactiveshell import InteractiveShell

from ctxkv_lib.errors import Stopped, is_out_of_memory


def test_a_notebook_shows_a_stop_as_one_line(monkeypatch):
    shown = []
    shell = InteractiveShell()
    monkeypatch.setattr(shell, "_showtraceback", lambda kind, value, lines: shown.append(lines))
    shell.user_ns["stopped"] = Stopped("Stopped. Epochs 1 to 3 are kept; run the cell again.")
    result = shell.run_cell("raise stopped")
    assert isinstance(result.error_in_exec, KeyboardInterrupt)  # so that no later cell runs
    assert shown == [["Stopped. Epochs 1 to 3 are kept; run the cell again."]]


def test_cublas_without_room_to_initialise_is_out_of_memory():
    found = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")
    assert is_out_of_memory(found)
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
