"""Entry point of the command `ctxkv` and of `python -m ctxkv_lib`."""

import sys


def main() -> int:
    """Run `cli.main`. Ctrl-C prints a one-line message, even while the module `cli` is being imported."""
    # Plug-ins in the current folder can then be imported, as with `python -m`.
    sys.path.append("")
    try:
        from .cli import main

        return main()
    except KeyboardInterrupt:
        print("ctxkv: Stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
