"""Set the number of threads of torch."""

from multiprocessing import context, current_process


def set_threads(count: int) -> None:
    """Let torch compute with `count` threads, but with one in a forked process.

    Launchers of notebooks fork. A fork has no copies of OpenMP's threads, for which OpenMP would wait
    forever.
    """
    import torch

    is_fork = isinstance(current_process(), getattr(context, "ForkProcess", ()))  # Windows has no forks
    torch.set_num_threads(1 if is_fork else count)
