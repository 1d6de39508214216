"""nbmake executes notebooks side by side, and they share run folders: each worker gets runs of its own."""

import os

RUNS = os.environ.get("CTXKV_RUNS", "runs")
os.environ["CTXKV_RUNS"] = os.path.join(RUNS, os.environ.get("PYTEST_XDIST_WORKER", ""))
