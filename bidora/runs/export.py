"""The job of `bidora export`: a run's model in a form that needs no PEFT."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidora._files import write_whole
from bidora.errors import UserError
from bidora.methods import make_method
from bidora.methods.loading import whole_lines
from bidora.runs.card import outputs_of
from bidora.runs.predict import find_base, load_run, read_run
from bidora.runs.results import Listener
from bidora.tasks.registry import make_task

if TYPE_CHECKING:
    import torch

    from bidora.models import ModelSource

__all__ = ["DTYPES", "Exported", "export"]

DTYPES = ("float32", "bfloat16", "float16")
"""What weights may be written in."""

MARKER = "export.json"
"""The file that tells an export from runs and other models, and names its files.

No run writes one, and neither does transformers, so that what a run was trained on or a
model that was saved otherwise is never taken for an export.
"""

LARGEST_DIFFERENCE = 1e-3
"""Of the merged outputs from the run's own, over the largest of them.

Merging adds up each weight once more in float32, which costs about 1e-6 of the outputs and
1e-4 where large ones cancel. More than this is no rounding.
"""


@dataclass(frozen=True)
class Exported:
    """A model that was written.

    Attributes:
        folder: Where it is.
        dtype: What its weights are written in.
        difference: Largest difference of an output from that of the run's own model, on
            made-up inputs, over the largest output; with the weights as they are written,
            rounded to `dtype`, and computed in float32.
        loading_code: Lines of Python that load it in plain transformers.
    """

    folder: str
    dtype: str
    difference: float
    loading_code: str


def export(
    run: str | Path,
    output: str | Path,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Exported:
    r"""Write a run's model whole, its adapter merged into the weights.

    An adapted weight becomes $W = W_0 + sBA$ for LoRA, and for DoRA
    $W_i = m_i (W_0 + sBA)_i / \lVert (W_0 + sBA)_i \rVert$, row by row. What other methods
    trained is in the model already. The merged model's outputs are compared with those of
    the model that it was made of. An adapted weight that the model uses in two places, such
    as input embeddings tied to the output layer, becomes two weights: only one of them was
    adapted.

    Args:
        run: Folder of a finished run.
        output: Folder to write.
        dtype: One of `DTYPES`.
        overwrite: Whether the folder may be there already; an earlier export, or an empty
            folder, is replaced. Anything else is refused.
        listener: Told what happens.

    Returns:
        What was written.

    Raises:
        UserError: If the run is not finished, its base model is not there, its model
            can't be merged, the merged model gives other outputs, `dtype` can't hold its
            weights, or the folder is there already, holds something else than an export,
            or cannot be written.
    """
    import torch

    from bidora.models import without_bars

    listener = listener or Listener()
    source, target = Path(run).expanduser(), Path(output).expanduser()
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    settings, schema = read_run(source)
    with _writing_to(target):
        _refuse_target(target, source, settings.model, overwrite=overwrite)
    if not make_method(settings.method).saves_whole:
        _refuse_quantised(find_base(source, settings))
    with _staged(target) as staging:
        model, tokenizer = load_run(source)
        inputs = _made_up(tokenizer, model.config)
        before = _outputs(model, inputs)
        merged = _merge(model, settings.method)
        difference = _difference(before, _outputs(merged, inputs))
        _refuse_other_outputs(difference, source)
        listener.message(f"Merged {source}: outputs differ by {difference:.1e} at most")
        if dtype != "float32":
            _round(merged, dtype)
            difference = _difference(before, _outputs(merged, inputs))
            listener.message(
                f"Rounded to {dtype}: outputs differ by {difference:.1e} at most"
            )
        task = make_task(schema.task, **schema.settings).for_model(merged.config)
        names = {
            "folder": str(target),
            "auto_model": task.auto_model,
            "auto_processor": task.auto_processor,
            "pooling": getattr(merged.config, "pooling", "head"),
            "pairs": getattr(merged.config, "pairs", "together"),
        }
        code = whole_lines(names)
        with _writing_to(target):
            with without_bars():
                merged.to(getattr(torch, dtype)).save_pretrained(str(staging))
            tokenizer.save_pretrained(str(staging))
            shutil.copyfile(source / "task.json", staging / "task.json")
            outputs = f"{task.name}. Outputs: {outputs_of(task, schema)}."
            here = {**names, "folder": "."}
            card = _card(settings.model, settings.method, outputs, here)
            (staging / "README.md").write_text(card, "utf-8")
            _mark(staging, settings.model, settings.method, dtype, difference)
            # Looked at again: the merge may have taken minutes.
            _refuse_target(target, source, settings.model, overwrite=overwrite)
            _put_in_place(staging, target.resolve())
    return Exported(str(target), dtype, difference, code)


def _refuse_target(target: Path, source: Path, base: str, *, overwrite: bool) -> None:
    """Refuse what must not be replaced: all but earlier exports and empty folders.

    Args:
        target: What was asked for.
        source: The run.
        base: The model that it was trained on, a folder or a name.
        overwrite: Whether an earlier export may go.

    Raises:
        UserError: If it is to stay.
    """
    place = target.resolve()
    if place == source.resolve():
        raise UserError(
            f"--output {target} is the run itself, whose adapter would be lost; name "
            "another folder."
        )
    if not target.exists():
        return
    # A base model may be an export itself.
    if place == Path(base).expanduser().resolve():
        raise UserError(
            f"--output {target} is the base model of {source}, which would be lost; "
            "name another folder."
        )
    if target.is_dir():
        _refuse_other_folders(target)
    if not target.is_dir() or not overwrite:
        raise UserError(
            f"--output {target} is there already; name another folder"
            + (", or add --overwrite." if target.is_dir() else ".")
        )


def _refuse_other_folders(target: Path) -> None:
    """Refuse a folder whose files are not all of an earlier export."""
    there = sorted(entry.name for entry in target.iterdir())
    written = _files_of_export(target)
    strangers = [name for name in there if name not in written]
    if not strangers:
        return
    run = [name for name in ("settings.json", "metrics.json") if name in there]
    if written:
        what = f"{strangers[0]}, which the export there did not write"
        remedy = "move it elsewhere, or name another folder"
    elif run:
        what, remedy = f"a run ({run[0]})", "name another folder"
    elif "adapter_config.json" in there:
        what, remedy = "an adapter (adapter_config.json)", "name another folder"
    elif "config.json" in there:
        what = f"a model that is no export (it has no {MARKER})"
        remedy = "name another folder, or delete this one yourself if nothing needs it"
    else:
        what, remedy = f"{there[0]}, which is of no export", "name another folder"
    raise UserError(
        f"--output {target} holds {what}, and only an earlier export is ever replaced; "
        f"{remedy}."
    )


def _files_of_export(folder: Path) -> set[str]:
    """Return the names that an export there says it wrote, none if there is no export."""
    try:
        content = json.loads((folder / MARKER).read_text("utf-8"))
        return {str(name) for name in content["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _mark(folder: Path, base: str, method: str, dtype: str, difference: float) -> None:
    """Write what tells the folder from everything else, the last of its files."""
    content = {
        "model": base,
        "method": method,
        "dtype": dtype,
        "difference": difference,
        "files": sorted([*(entry.name for entry in folder.iterdir()), MARKER]),
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / MARKER, text)


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside the target, and leave nothing of it behind.

    It is made before the model is loaded and merged, which may take minutes: where nothing
    can be written, that is known at once.
    """
    place = target.resolve()
    staging = place.with_name(f".{place.name}.partial")
    made = [parent for parent in staging.parents if not parent.exists()]
    try:
        with _writing_to(target):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # the export is in it, or it was never made
                parent.rmdir()


@contextmanager
def _writing_to(target: Path) -> Iterator[None]:
    """Name the option where something cannot be written."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter where a disk is full
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--output {target} cannot be written ({why}); name a folder in a place of "
            "your own, with room for the whole model."
        ) from error


def _put_in_place(new: Path, target: Path) -> None:
    """Move a finished folder into place; an earlier one is there until the new one is."""
    if not target.exists():
        os.replace(new, target)
        return
    earlier = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(earlier, ignore_errors=True)  # of an export that was killed
    os.replace(target, earlier)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(earlier, target)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _refuse_quantised(base: ModelSource) -> None:
    """Look before the weights are loaded, which may take a library that is not there."""
    from bidora.models import load_config

    if base.gguf_file is not None:
        return  # its weights are brought back to float32 as they are loaded
    if getattr(load_config(base), "quantization_config", None) is not None:
        raise UserError(
            f"the base model {base.name} is quantised, and a merged weight would be "
            "rounded to its few bits, which undoes the training. Export onto the model "
            "that it was quantised from: set `model` in the run's settings.json to it."
        )


def _merge(model: Any, method: str) -> Any:
    """Return the model without adapters, all that was trained in its weights."""
    import torch
    from peft import PeftModel

    if method == "houlsby":
        raise UserError(
            "Houlsby's bottlenecks are layers of their own, which no weight of the model "
            "can take in; the run's README.md says how to load it as it is."
        )
    merged = model
    if isinstance(model, PeftModel):
        _untie(model)
        try:
            merged: Any = model.merge_and_unload()
        except NotImplementedError as error:
            raise UserError(
                f"PEFT cannot merge {_in_groups(model) or 'a layer of this adapter'} "
                f"({error}). Load the adapter with PEFT, as the run's README.md says, or "
                "train again with --target-modules that leave such layers out."
            ) from error
    broken = [n for n, p in merged.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        raise UserError(
            f"{len(broken)} weight(s) hold values that are not finite, such as "
            f"{broken[0]}. The training has diverged; lower the learning rate."
        )
    return merged


def _round(model: Any, dtype: str) -> None:
    """Round what is written of a model to a type, and keep it in float32.

    Parameters and buffers stay the same objects, so that tied weights stay tied.

    Raises:
        UserError: If a value is beyond what the type holds.
    """
    import torch

    kind = getattr(torch, dtype)
    held = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
    largest = torch.finfo(kind).max
    over = {n: t for n, t in held.items() if not t.to(kind).isfinite().all()}
    if over:
        name, tensor = next(iter(over.items()))
        other = "bfloat16" if dtype == "float16" else "float32"
        raise UserError(
            f"{len(over)} weight(s) hold values beyond what {dtype} holds, such as "
            f"{tensor.abs().max().item():.3g} in {name}, where {largest:.3g} is the "
            f"largest; take --dtype {other}. Nothing was written."
        )
    for tensor in held.values():  # views of the model's own
        tensor.copy_(tensor.to(kind))


def _in_groups(model: Any) -> str:
    """Return which adapted convolutions work in groups, nothing if none does."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = [
        name
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, BaseTunerLayer)
        and getattr(module.get_base_layer(), "groups", 1) > 1
    ]
    if not names:
        return ""
    return f"{len(names)} adapted convolution(s) in groups, such as {names[0]}"


def _untie(model: Any) -> None:
    """Give every place that uses an adapted weight a copy of its own.

    The adapter changes what one place computes. Merged into a tied weight, it would change
    them all.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    bases: list[Any] = [layer.get_base_layer() for layer in layers]
    adapted = {id(getattr(base, "weight", None)) for base in bases}
    places: dict[int, list[Any]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in adapted:
            places.setdefault(id(weight), []).append(module)
    tied = [module for users in places.values() if len(users) > 1 for module in users]
    for module in tied:
        module.weight = torch.nn.Parameter(module.weight.detach().clone())
    if not tied:
        return
    config = model.get_base_model().config
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False  # or they are tied again as they are loaded


def _made_up(tokenizer: Any, config: Any) -> dict[str, torch.Tensor]:
    """Return two rows of tokens, the second with padding at its end; or two images.

    Each row has the model's end token, if it has one: the head of a T5 reads its state.
    """
    import torch

    if not hasattr(tokenizer, "all_special_ids"):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (2, 32, 32, 3), generator=generator)
        images = list(noise.to(torch.uint8).numpy())
        return dict(tokenizer(images=images, return_tensors="pt"))
    special = set(tokenizer.all_special_ids)
    words = [i for i in range(min(len(tokenizer), 2000)) if i not in special][:12]
    ids = torch.tensor([words, words[::-1]])
    mask = torch.ones_like(ids)
    ids[1, -2:], mask[1, -2:] = tokenizer.pad_token_id, 0
    ends = getattr(config, "eos_token_id", None)
    end = ends[0] if isinstance(ends, list) else ends  # Llama 3 has several
    if end is not None and end < len(tokenizer):
        ids[0, -1], ids[1, -3] = end, end
    made = {"input_ids": ids, "attention_mask": mask}
    if getattr(config, "pairs", "together") == "apart":
        made |= {f"pair_{name}": value.flip(0) for name, value in made.items()}
    return made


def _outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    import torch

    if getattr(model.config, "is_encoder_decoder", False):
        inputs = {**inputs, "decoder_input_ids": inputs["input_ids"]}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    return logits[0] if logits.dim() == 3 else logits  # tags: the row without padding


def _difference(before: torch.Tensor, after: torch.Tensor) -> float:
    gap = (after - before).abs().max()
    return (gap / before.abs().max()).item() if gap else 0.0  # a head may be all zeros


def _refuse_other_outputs(difference: float, run: Path) -> None:
    # Written so that NaN is refused too.
    if not difference <= LARGEST_DIFFERENCE:
        raise UserError(
            f"the merged model's outputs differ from those of {run} by "
            f"{difference:.1e} of the largest, and rounding costs less than "
            f"{LARGEST_DIFFERENCE:.0e}. Nothing was written. Likely an adapted weight is "
            "used in a second place, which the adapter does not reach (embeddings, with "
            "--target-modules). The adapter itself is right: load it with PEFT, as the "
            "run's README.md says, or train again without that module."
        )


def _card(base: str, method: str, outputs: str, names: dict[str, str]) -> str:
    return f"""\
# {base}, fine-tuned by `{method}` and merged

The weights of a run of hypergrad-bidora, with its adapter merged in: no PEFT is needed.

- **Task**: {outputs} More of it is in `task.json`.

With this folder as the working folder:

```python
{whole_lines(names)}```
"""
