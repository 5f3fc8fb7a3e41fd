"""Comparisons of methods over tasks, sizes and seeds: the job of `bidora compare`."""

__all__: list[str] = []
