"""Layouts of data sets that are neither csv, tsv nor JSON lines.

`conll` reads column files, with one word a line; `fasta` reads proteins; `sgml` reads
Reuters-21578.
"""

from __future__ import annotations

from bidora.data.formats.conll import conll_source, is_conll, read_conll
from bidora.data.formats.fasta import classes_of_files, fasta_source, fasta_table
from bidora.data.formats.sgml import is_reuters, reuters_source

__all__ = [
    "classes_of_files",
    "conll_source",
    "fasta_source",
    "fasta_table",
    "is_conll",
    "is_reuters",
    "read_conll",
    "reuters_source",
]
