"""What a method trained, as one safetensors file, where no library has a format for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bidora.errors import UserError

__all__ = ["load_trained", "save_trained"]


def save_trained(model: Any, file: Path, **metadata: str) -> None:
    """Write the parameters that are trained.

    Args:
        model: The model.
        file: Where to.
        metadata: What else a load needs.
    """
    from safetensors.torch import save_file

    trained = {
        name: p.detach().cpu().contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    save_file(trained, str(file), metadata=metadata)


def load_trained(model: Any, file: Path) -> None:
    """Put such parameters into a model.

    Args:
        model: The model that they were trained in.
        file: Where they are.

    Raises:
        UserError: If they belong to another model.
    """
    from safetensors.torch import load_file

    found = model.load_state_dict(load_file(str(file)), strict=False)
    if found.unexpected_keys:
        raise UserError(
            f"{file} does not fit its base model: it has no "
            f"{', '.join(found.unexpected_keys[:4])}. Was the model changed since the "
            "training?"
        )
