"""Jobs: what a run is told, does, keeps and leaves behind."""

__all__: list[str] = []
