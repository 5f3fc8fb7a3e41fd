"""What `--method help` and `--recipe help` print."""

from __future__ import annotations

import textwrap

__all__ = ["list_methods", "list_recipes"]


def list_methods() -> str:
    """Return the methods, one a line with what each is."""
    from bidora.methods import METHODS

    return "".join(f"{n:<24} {METHODS.get(n).summary}\n" for n in METHODS.names())


def list_recipes() -> str:
    """Return the recipes under their sources, with what is not from there."""
    from bidora.recipes import load_recipe, recipe_names

    paragraphs: list[str] = []
    told = ""
    for name in recipe_names():
        recipe = load_recipe(name)
        if recipe.source != told:
            told = recipe.source
            ours = f" Chosen here: {', '.join(recipe.ours)}." if recipe.ours else ""
            paragraphs.append(textwrap.fill(f"{told}.{ours}", width=88) + "\n")
        paragraphs[-1] += f"  {name}\n"
    return "\n".join(paragraphs)
