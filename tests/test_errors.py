from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell

from ctxkv_lib.errors import DamagedFile, Stopped, UserError, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        Stopped(),
        UserError("preset is 'moon'; allowed: colab."),
        DamagedFile(Path("a"), "it is not JSON"),
    ],
)
def test_a_notebook_shows_one_line_and_no_frames(monkeypatch, error):
    shown = []
    shell = InteractiveShell()
    monkeypatch.setattr(shell, "_showtraceback", lambda kind, value, lines: shown.append(lines))
    shell.user_ns["error"] = error
    result = shell.run_cell("raise error")
    assert result.error_in_exec is error  # so that no later cell runs
    assert shown == [[str(error)]]


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    ],
)
def test_libraries_without_room_are_out_of_memory(said):
    assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
