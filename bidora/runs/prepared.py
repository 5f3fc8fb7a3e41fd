"""What a job works on: model, tokenizer and tokenised examples, on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bidora.errors import UserError
from bidora.runs.encoding import encode, unknown
from bidora.runs.examples import Examples
from bidora.runs.job_settings import JobSettings
from bidora.runs.results import Listener
from bidora.tasks.proteins import mostly_residues

if TYPE_CHECKING:
    import torch

    from bidora.methods.base import Method
    from bidora.models import ModelSource

__all__ = ["Prepared", "find_device", "prepare"]


MANY_UNKNOWN = 0.01
"""Part of the tokens from which on it is told that they are unknown."""


@dataclass
class Prepared:
    """What a job works on.

    Attributes:
        settings: What the user asked for.
        examples: Rows and their split.
        source: Where the base model came from.
        tokenizer: The model's tokenizer, or its image processor.
        model: The model with what the method put in, on its device.
        sets: Tokenised examples by part, as `datasets.Dataset`.
        length: Tokens kept of an example.
        pooling: How tokens are pooled; `head` for the stock class.
        pairs: How two texts are read: `together` or `apart`.
        linear_layers: Names of the base model's linear layers, without the head's.
    """

    settings: Any
    examples: Examples
    source: ModelSource
    tokenizer: Any
    model: Any
    sets: dict[str, Any]
    length: int
    pooling: str
    pairs: str
    linear_layers: list[str]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def metric(self) -> str:
        """The main metric."""
        schema, task = self.examples.schema, self.examples.task
        return schema.metric or task.main_metric

    @property
    def judging_metric(self) -> str:
        """What is measured at every evaluation, and stops a run early."""
        return self.examples.task.judged_by or self.metric

    @property
    def collate(self) -> Any:
        """What makes a batch of a list of features."""
        return self.examples.task.collator(self.tokenizer)


def prepare(
    settings: JobSettings,
    method: Method,
    source: ModelSource,
    examples: Examples,
    device: torch.device,
    listener: Listener,
) -> Prepared:
    """Load the model, put in what the method needs, and encode; nothing is written.

    Args:
        settings: What to load, and how.
        method: What is put in.
        source: Where the base model is.
        examples: The data.
        device: Where the model goes.
        listener: Told what was loaded.

    Returns:
        Everything that a Trainer takes.

    Raises:
        UserError: If the model can't be loaded, or does not fit.
    """
    from bidora.models import load_base, load_config, load_processor, longest_input

    if not examples.task.has_probe and method.phases == ("probe",):
        raise UserError(
            f"--method {method.name} is {method.summary}, and {examples.task.name} needs "
            "no new head: the model's own outputs are its answers. Choose another method, "
            "such as lora."
        )
    task, schema = examples.task.for_model(load_config(source)), examples.schema
    tokenizer = load_processor(source, task, **getattr(task, "processor_kwargs", {}))
    tokenizer = task.fit_processor(tokenizer, schema)
    base = load_base(
        source,
        tokenizer,
        task,
        schema,
        seed=settings.seed,
        pooling=settings.pooling,
        pairs=settings.pairs,
    )
    examples.task = task = task.for_model(base.model.config)
    task.try_model(base.model, tokenizer, examples.rows)
    linear_layers = base.linear_layers()  # before the method changes the model
    model: Any = method.adapt(base, settings).to(device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    listener.message(
        f"Model  {settings.model}: {method.name} trains {trained:,} of its "
        f"{total:,} parameters, on {device}"
    )
    if base.pairs == "apart":
        listener.message(
            "       The two texts are read apart, and the head reads how their vectors "
            "differ (--pairs)."
        )
    usual = examples.source.hints.get("max_length") or task.usual_length
    longest = longest_input(base.model)
    length = settings.tokens_kept(longest, usual)
    skip = settings.on_bad_row == "skip"
    unfit = task.check_lengths(
        examples.joined(), tokenizer, schema, length, longest, skip=skip
    )
    if unfit:
        examples.leave_out(unfit)
        listener.message(
            f"       {len(unfit)} bad row(s) left out, such as: "
            f"{next(iter(unfit.values()))}"
        )
    sets = {
        part: encode(rows, task, schema, tokenizer, length)
        for part, rows in examples.rows.items()
    }
    cut = task.count_over_long(examples.rows["train"], tokenizer, length)
    if cut:
        listener.message(
            f"       {cut} of {len(sets['train'])} training examples are longer than the "
            f"{length} tokens that are kept (--max-length)."
        )
    lost, share = unknown(sets["train"], tokenizer)
    if share >= MANY_UNKNOWN or (lost and schema.settings.get("proteins")):
        remedy = "Another --model may know the language, or the residues."
        if schema.settings.get("proteins") is False and mostly_residues(
            examples.rows["train"].columns["text"]
        ):
            remedy = "They look like proteins, and are read as words: say --proteins."
        listener.message(
            f"       {lost} of {len(sets['train'])} training examples have tokens that the "
            f"model does not know ({tokenizer.unk_token}, {share:.1%} of all): it reads "
            f"nothing there. {remedy}"
        )
    return Prepared(
        settings,
        examples,
        source,
        tokenizer,
        model,
        sets,
        length,
        base.pooling,
        base.pairs,
        linear_layers,
    )


def find_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is a GPU where there is one.

    Args:
        name: What the user called it.

    Returns:
        The device, with its index.

    Raises:
        UserError: If it can't be used.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} cannot be used ({str(error).splitlines()[0][:160]}); "
            "choose cpu, or leave it out."
        ) from error
