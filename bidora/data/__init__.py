"""Where the examples of a job come from: files, folders and the Hugging Face Hub.

Nothing here knows what a task is, and reading a file imports neither torch nor
datasets.
"""

from __future__ import annotations

from bidora.data.files import read_file
from bidora.data.load import load_source
from bidora.data.source import PARTS, Source
from bidora.data.table import Table, name_column, same_column

__all__ = [
    "PARTS",
    "Source",
    "Table",
    "load_source",
    "name_column",
    "read_file",
    "same_column",
]
