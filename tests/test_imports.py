"""Commands import only what they need."""

from conftest import in_python

LIGHT = """
import sys

from ctxkv_lib.cli import main

def imported(*names):
    return [name for name in names if name in sys.modules]

main(["list", "--json", sys.argv[1]])
assert not imported("torch", "transformers", "matplotlib")
main(["info", "--preset", "ci"])
assert not imported("torch._dynamo", "transformers", "matplotlib")
main(["generate", sys.argv[1], "--prompt", "the cat", "--max-new-tokens", "2"])
main(["run", "--out", sys.argv[1]])
assert not imported("torch._dynamo", "transformers.modeling_utils", "matplotlib")
"""


def test_commands_import_only_what_they_need(finished_run):
    in_python(LIGHT, finished_run.path)
