"""The command ``svdalign``, also as ``python -m svdalign``. It lives in the lab, an extra."""

from __future__ import annotations

import importlib.util
import sys

#: Imported by every command; only the extra ``lab`` brings it.
_NEEDED = "jsonargparse"


def main() -> int:
    """Run the command line; an exit code. Without the extra ``lab`` say what to install."""
    if importlib.util.find_spec(_NEEDED) is None:
        print(
            "svdalign: the command line needs an extra: pip install 'svdalign[lab]'",
            file=sys.stderr,
        )
        return 2
    from .lab.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
