"""nbmake executes notebooks side by side: each worker gets run folders of its own."""

import os

RUNS = os.environ.get("CTXKV_RUNS", "runs")
os.environ["CTXKV_RUNS"] = os.path.join(RUNS, os.environ.get("PYTEST_XDIST_WORKER", ""))
