"""Errors: what a notebook shows, and which variables stay available for `%debug`."""

import pytest
from IPython.core.interactiveshell import InteractiveShell

from ctxkv_lib.errors import Interrupted, UserError, friendly_errors


@pytest.mark.parametrize("error", [Interrupted(), UserError("preset is 'moon'; allowed: colab.")], ids=repr)
def test_a_notebook_shows_one_line_and_no_frames(monkeypatch, error):
    shown = []
    shell = InteractiveShell()
    monkeypatch.setattr(shell, "_showtraceback", lambda kind, value, lines: shown.append(lines))
    shell.user_ns["error"] = error
    result = shell.run_cell("raise error")
    assert result.error_in_exec is error  # Jupyter then runs no later cell
    assert shown == [[str(error)]]


@pytest.mark.parametrize(
    ("error", "said", "is_kept"),
    [
        (RuntimeError("a fault of the user's own"), "a fault of the user's own", True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "^The GPU's memory is full", False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "^The GPU's memory is full", False),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), "^Memory is full; lower phase2.batch", False),
    ],
)
def test_variables_are_freed_when_memory_is_full_and_kept_for_the_users_own_errors(error, said, is_kept):
    def forward(inputs):
        raise error

    @friendly_errors()
    def run():
        forward([0] * 5)

    with pytest.raises((RuntimeError, UserError), match=said):
        run()
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    assert ("inputs" in frame.tb_frame.f_locals) == is_kept  # `%debug` shows these variables
