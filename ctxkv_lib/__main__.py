"""The `ctxkv` command, and `python -m ctxkv_lib`."""

import sys


def main() -> int:
    """Run one command with `cli.main`. Ctrl-C prints one line, even while that module loads."""
    sys.path.append("")  # finds plug-ins in the current folder, as `python -m` does
    try:
        from .cli import main

        return main()
    except KeyboardInterrupt:
        print("ctxkv: Stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
