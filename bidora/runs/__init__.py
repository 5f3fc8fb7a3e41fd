"""Jobs: what a run is told, does, keeps and leaves behind."""
