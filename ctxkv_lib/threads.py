"""How OpenMP's threads wait for each other. It is read when torch loads, so it is decided before."""

import os


def wait_calmly_if_busy() -> None:
    """Let threads sleep while they wait, if there is work for every core already.

    Beside other work they would spin away each other's time; on an idle machine, those that sleep wake late.
    What `$OMP_WAIT_POLICY` says already is left.
    """
    if not hasattr(os, "getloadavg") or os.getloadavg()[0] >= (os.cpu_count() or 1):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
