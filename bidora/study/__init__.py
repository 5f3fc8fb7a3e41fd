"""Comparisons of methods over tasks, sizes and seeds: the job of `bidora compare`."""

from __future__ import annotations
