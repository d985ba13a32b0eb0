"""The `ballast` command's entry point; the commands are in `ballast.commands`."""

from __future__ import annotations

import sys

from ballast.commands.app import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
