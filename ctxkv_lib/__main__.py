"""The `ctxkv` command, and `python -m ctxkv_lib`."""

import sys


def main() -> int:
    """Run one command as `cli.main` does; Ctrl-C while that loads is one line, too."""
    sys.path.append("")  # plug-ins in the current folder, as `python -m` finds them
    try:
        from .cli import main

        return main()
    except KeyboardInterrupt:
        print("ctxkv: Stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
