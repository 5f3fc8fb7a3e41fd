"""Recipes: the settings of published runs, a YAML file for each of their tables.

A file holds `source`, the `settings` that all of its `recipes` share, and by name what
each has of its own. `ours` lists the settings that the source does not give and that
were chosen here; `data` says what to pass as the task where nothing has a name for it.
"""

from bidora.recipes.reading import Recipe, load_recipe, recipe_names

__all__ = ["Recipe", "load_recipe", "recipe_names"]
