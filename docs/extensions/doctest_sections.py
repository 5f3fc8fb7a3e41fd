"""A griffe extension: show the `Example:` sections of docstrings as code.

Google style allows `Example:` and `Examples:`; griffe reads only the second as doctests
and would take the first for prose, in which `x["w"]` is a broken link.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class DoctestSections(griffe.Extension):
    """Rename `Example:` to `Examples:` in what the reference shows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object, in memory."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"(?m)^Example:$", "Examples:", obj.docstring.value
            )
