"""``python -m svdalign`` is the command ``svdalign``."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
