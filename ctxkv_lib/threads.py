"""How many threads torch computes with, and how OpenMP's threads wait for each other."""

import os
from multiprocessing import context, current_process


def wait_calmly_if_busy() -> None:
    """Let threads sleep while they wait, if there is work for every core already; torch reads it as it loads.

    Beside other work they would spin away each other's time; on an idle machine, those that sleep wake late.
    What `$OMP_WAIT_POLICY` says already is left.
    """
    if not hasattr(os, "getloadavg") or os.getloadavg()[0] >= (os.cpu_count() or 1):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def set_threads(count: int) -> None:
    """Let torch compute with so many threads; with one in a process that began as a copy of another.

    So the launchers of notebooks make it. Threads are not copied, but OpenMP would wait for them forever.
    """
    import torch

    is_copy = isinstance(current_process(), getattr(context, "ForkProcess", ()))  # Windows makes none
    torch.set_num_threads(1 if is_copy else count)
