"""What a run leaves: what was trained, how to load it, and what is told of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidora.errors import UserError
from bidora.runs.folder import RunFolder
from bidora.runs.results import RunResult, environment
from bidora.runs.settings import TrainSettings

if TYPE_CHECKING:
    from bidora.methods.base import Method
    from bidora.models import ModelSource
    from bidora.runs.prepared import Prepared

__all__ = ["save_run"]


def save_run(
    job: Prepared,
    method: Method,
    folder: RunFolder,
    result: RunResult,
    history: Sequence[dict[str, Any]],
    title: str,
) -> None:
    """Save what was trained, the tokenizer, the picture, the card, and last the metrics.

    Args:
        job: What was worked on; its model is trained.
        method: How.
        folder: Where to.
        result: What it came to.
        history: Records of its steps and evaluations.
        title: What stands above the picture.

    Raises:
        UserError: If the result is to be uploaded, and can't be; it is saved then.
    """
    from bidora.runs.card import write_card
    from bidora.runs.plots import draw_curves

    staging = folder.staging()
    method.save(job.model, staging)
    _name_the_base(staging, job.source)
    # Labels by name, the size of the head, the padding token: what loading needs.
    _transformer(job.model).config.save_pretrained(str(staging))
    job.tokenizer.save_pretrained(str(staging))
    draw_curves(history, staging / "curves.png", title, job.judging_metric)
    write_card(
        staging, job.settings, job.examples, job.source, result, job.pooling, job.pairs
    )
    files = folder.publish()
    parameters = list(job.model.parameters())
    folder.write_json(
        "metrics.json",
        {
            "phases": [dataclasses.asdict(phase) for phase in result.phases],
            "probe": dataclasses.asdict(result.probe) if result.probe else None,
            "baseline": result.baseline,
            "metric": job.metric,
            "seconds": result.seconds,
            "label_names": list(job.examples.schema.label_names),
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": result.trained_parameters,
            "environment": environment(job.device),
            "files": files,
        },
    )
    folder.remove_checkpoints()
    if job.settings.push_to_hub:
        _push(folder.path, job.settings, files)


def _name_the_base(folder: Path, source: ModelSource) -> None:
    """Let an adapter name the Hub's model, where there is one, and no path of ours."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text("utf-8"))
    config["base_model_name_or_path"] = source.hub_name
    file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _transformer(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _push(folder: Path, settings: TrainSettings, files: list[str]) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    name = settings.hub_model_id or folder.name
    try:
        url = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=str(folder),
            allow_patterns=[*files, "metrics.json", "settings.json", "task.json"],
        )
    except Exception as error:  # network, rights, names
        raise UserError(
            f"the result is saved in {folder}, and the upload to {name!r} failed "
            f"({str(error).splitlines()[0][:200]}). Log in with `hf auth login`, then: "
            f"hf upload {name} {folder}"
        ) from error
