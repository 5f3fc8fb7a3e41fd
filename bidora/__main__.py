"""Run the command line with `python -m bidora`."""

from __future__ import annotations

import sys

from bidora.cli import main

sys.exit(main())
