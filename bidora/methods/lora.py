"""LoRA and its kin, by PEFT: LoRA, rank-stabilised LoRA, DoRA with either forward."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bidora.errors import UserError
from bidora.methods.base import OF_LORA_PLUS, SEARCH_ONLY, Method
from bidora.methods.loading import base_lines

if TYPE_CHECKING:
    from torch import nn

    from bidora.models import Base
    from bidora.runs.job_settings import JobSettings

__all__ = ["ExactDora", "Lora", "PeftDora", "RankStabilisedLora"]

OTHER_WAY = "fan_in_fan_out is set to"
"""PEFT's note that a layer stores its weight the other way round; it sees to that."""

TIED = "Model has `tie_word_embeddings=True` and a tied layer"
"""PEFT's warning about adapted embeddings, which `bidora export` unties as it merges."""

ZERO_ROWS = "Base weights have rows of zeros"
"""Our own note, which the training told already."""


@contextmanager
def _without(*beginnings: str) -> Iterator[None]:
    """Leave out warnings that begin so, and no others."""
    with warnings.catch_warnings():
        for beginning in beginnings:
            warnings.filterwarnings("ignore", beginning)
        yield


def _all_conv1d(base: Base, targets: list[str]) -> bool:
    """Return whether every adapted layer is GPT-2's, whose weight is `(in, out)`."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    ends = tuple(f".{target}" for target in targets)
    layers = [
        module
        for name, module in base.model.named_modules()
        if f".{name}".endswith(ends) and isinstance(module, nn.Linear | Conv1D)
    ]
    return bool(layers) and all(isinstance(module, Conv1D) for module in layers)


def _check_targets(base: Base, targets: list[str], model: str) -> None:
    """Refuse a name that no module's ends in, which PEFT passes over if others do."""
    names = [f".{name}" for name, _ in base.model.named_modules()]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in names):
            able = base.adaptable()
            near = get_close_matches(target, able, n=1)
            raise UserError(
                f"--target-modules: no layer of {model!r} ends in {target!r}"
                + (f"; did you mean {near[0]}?" if near else ".")
                + f" Its layers that can be adapted end in {', '.join(able)}."
            )


class Lora(Method):
    """Low-rank changes of weights [HSW22]."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "LoRA: a low-rank change of each adapted weight"
    config: ClassVar[Mapping[str, Any]] = {}
    """Fields of PEFT's `LoraConfig` beside rank, scale, dropout and place."""

    def adapt(self, base: Base, settings: JobSettings) -> nn.Module:
        """Return the PEFT model, its head among the trained modules.

        Args:
            base: The loaded model.
            settings: Of the run.

        Raises:
            UserError: If the model has no such layers.
        """
        from peft import LoraConfig, get_peft_model

        asked = settings.target_modules
        # PEFT's own all-linear would go into heads that it does not know by name.
        wanted = asked or ("all-linear",)
        targets = [name for name in wanted if name != "all-linear"]
        _check_targets(base, targets, settings.model)
        if len(targets) < len(wanted):
            targets += base.linear_layers()
        config = LoraConfig(
            task_type=base.peft_type,
            r=settings.lora_r,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a float too
            lora_dropout=settings.lora_dropout,
            target_modules=targets,
            modules_to_save=base.head or None,
            fan_in_fan_out=_all_conv1d(base, targets),
            **self.config,
        )
        try:
            with _without(OTHER_WAY):  # a model may have layers of both kinds
                return get_peft_model(base.model, config)
        except ValueError as error:
            raise UserError(
                f"--target-modules ({', '.join(wanted)}) does not fit {settings.model!r}: "
                f"{str(error).split('. ')[0][:200]}. Its layers that can be adapted end "
                f"in {', '.join(base.adaptable())}."
            ) from error

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter as PEFT does.

        Args:
            model: The PEFT model.
            folder: Where to.
        """
        # "auto" would ask the Hub about embeddings, which are never adapted here.
        model.save_pretrained(str(folder), save_embedding_layers=False)

    def load(self, base: Base, folder: Path) -> nn.Module:
        """Return the base with the saved adapter.

        Args:
            base: The loaded model.
            folder: Where the adapter is.

        Raises:
            UserError: If one of its files is missing.
        """
        from peft import PeftModel

        # PEFT would take the folder for a name on the Hub, and ask there.
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} has no {name}, which the training wrote there: it was "
                    "deleted, or left behind when the folder was copied. Copy it from "
                    "where the run was made, or train again."
                )
        with _without(OTHER_WAY, TIED):
            return PeftModel.from_pretrained(base.model, str(folder))

    def loading_code(self, names: Mapping[str, str]) -> str:
        """Return lines that load the adapter in plain PEFT.

        Args:
            names: `folder`, `base`, `auto_model` and `pooling`.
        """
        lines = base_lines(names, "from peft import PeftModel\n")
        return f"""\
{lines}
model = PeftModel.from_pretrained(base, {names["folder"]!r}).eval()
"""


class RankStabilisedLora(Lora):
    """LoRA scaled by α/√r [Kal23]."""

    name: ClassVar[str] = "rslora"
    summary: ClassVar[str] = "LoRA whose change is scaled by alpha / sqrt(rank)"
    config: ClassVar[Mapping[str, Any]] = {"use_rslora": True}


class PeftDora(Lora):
    """DoRA with PEFT's own forward, whose backward takes the norm for a constant."""

    name: ClassVar[str] = "dora-peft"
    summary: ClassVar[str] = "DoRA as PEFT computes it, all parameters at one rate"
    config: ClassVar[Mapping[str, Any]] = {"use_dora": True}
    exact: ClassVar[bool] = False

    def adapt(self, base: Base, settings: JobSettings) -> nn.Module:
        """Return the PEFT model.

        Args:
            base: The loaded model.
            settings: Of the run.

        Raises:
            UserError: If a weight has rows of zeros, of which PEFT's forward gives NaN.
        """
        model = super().adapt(base, settings)
        if not self.exact:
            _refuse_zero_rows(model)
        return model

    def load(self, base: Base, folder: Path) -> nn.Module:
        """Return the base with the saved adapter, whose layers are exact.

        Args:
            base: The loaded model.
            folder: Where the adapter is.
        """
        from bidora.dora import use_exact_dora

        model = super().load(base, folder)
        with _without(ZERO_ROWS):
            use_exact_dora(model)  # PEFT's own would give NaN for rows of zeros
        return model


class ExactDora(PeftDora):
    """DoRA with the exact forward; magnitudes may learn at a rate of their own."""

    name: ClassVar[str] = "dora"
    summary: ClassVar[str] = (
        "exact DoRA: magnitudes and directions together, each at a rate of its own"
    )
    ignores: ClassVar[tuple[str, ...]] = (*SEARCH_ONLY, *OF_LORA_PLUS)
    exact: ClassVar[bool] = True

    def adapt(self, base: Base, settings: JobSettings) -> nn.Module:
        """Return the PEFT model with exact DoRA layers.

        Args:
            base: The loaded model.
            settings: Of the run.
        """
        from bidora.dora import use_exact_dora

        model = super().adapt(base, settings)
        use_exact_dora(model)
        return model


def _refuse_zero_rows(model: nn.Module) -> None:
    """Look at the magnitudes, which begin as the norms of the rows."""
    found = {
        name.partition(".lora_magnitude_vector")[0]: int((m == 0).sum())
        for name, m in model.named_parameters()
        if ".lora_magnitude_vector" in name
    }
    zero = {name: count for name, count in found.items() if count}
    if zero:
        name, count = next(iter(zero.items()))
        raise UserError(
            f"{len(zero)} weight(s) of the model have rows of zeros, such as {count} of "
            f"{name}, and PEFT's DoRA divides by their norm, which gives NaN. Take "
            "--method dora, whose gain is 1 there, or --target-modules that leave such "
            "layers out."
        )
