"""Recipes: what they say is what was published, each resolves, and builds its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DebertaV2Config,
    EsmConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
)
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

from bidora.cli import main
from bidora.data.catalog import find_entry
from bidora.dora import magnitudes
from bidora.errors import UserError
from bidora.methods import make_method
from bidora.models import find_model
from bidora.recipes import load_recipe, recipe_names
from bidora.runs.examples import read_examples
from bidora.runs.prepared import prepare
from bidora.runs.results import Listener
from bidora.runs.settings import TrainSettings
from bidora.tasks.proteins import RESIDUES
from tests.bidora.language_models import tokenizer_of_words

# transformers' own, raised when PEFT reads its model
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)

SIZES: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 1026,
    "pad_token_id": 0,
}
CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "FacebookAI/roberta-base": RobertaConfig,
    "FacebookAI/roberta-large": RobertaConfig,
    "microsoft/deberta-v2-xxlarge": DebertaV2Config,
    "meta-llama/Llama-2-7b-hf": LlamaConfig,
    "facebook/esm2_t33_650M_UR50D": EsmConfig,
    "openai-community/gpt2-medium": GPT2Config,
}


def settings_of(name: str, **given: Any) -> TrainSettings:
    """Return a recipe's settings; data without a name of its own is a made-up file."""
    return TrainSettings.from_dict(load_recipe(name).with_given(given))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves(name: str) -> None:
    recipe = load_recipe(name)
    given = {} if "task" in recipe.settings else {"task": "mine.csv"}
    settings = settings_of(name, **given)
    assert (settings.method, settings.budget, settings.start) == (
        "bidora",
        "full",
        "random",
    )
    assert (settings.lora_r, settings.lora_alpha) == (4, 8.0)
    assert settings.validation_fraction == 0.2
    assert bool(recipe.data) == ("task" not in recipe.settings)
    assert "arXiv 2410.09758" in recipe.source


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("glue-roberta-base/mrpc", {"max_steps": 25_000, "learning_rate": 2e-5}),
        ("glue-roberta-base/qnli", {"max_steps": 15_000, "outer_weight_decay": 0.0}),
        ("glue-roberta-base/stsb", {"learning_rate": 1e-5, "outer_weight_decay": 0.01}),
        ("glue-roberta-large/qnli", {"max_steps": 60_000, "weight_decay": 0.5}),
        ("glue-roberta-large/sst2", {"outer_weight_decay": 0.05, "orthogonality": 0.0}),
        ("glue-roberta-large/mrpc", {"weight_decay": 0.0, "orthogonality": 1e-5}),
        ("reuters-roberta-base/modhayes", {"max_steps": 20_000, "learning_rate": 3e-5}),
        ("tags-roberta-base/conll2003", {"weight_decay": 0.2, "learning_rate": 2e-5}),
    ],
)
def test_figures_are_those_of_the_papers_tables(
    name: str, published: dict[str, float]
) -> None:
    recipe = load_recipe(name)
    assert {key: recipe.settings[key] for key in published} == published
    assert not set(recipe.ours) & set(published)


BASE = {  # steps, rate, outer weight decay; γ 1e-5 and inner decay 0.1 in all
    "mnli": (20_000, 5e-5, 0.1),
    "sst2": (12_000, 1e-5, 0.1),
    "mrpc": (25_000, 2e-5, 0.1),
    "cola": (20_000, 5e-5, 0.1),
    "qnli": (15_000, 2e-5, 0.0),
    "qqp": (20_000, 5e-5, 0.1),
    "rte": (15_000, 1e-5, 0.1),
    "stsb": (12_000, 1e-5, 0.01),
}
LARGE = {  # steps, γ, inner and outer weight decay; rate 1e-5 in all
    "mnli": (50_000, 0.0, 0.5, 0.5),
    "sst2": (20_000, 0.0, 0.5, 0.05),
    "mrpc": (30_000, 1e-5, 0.0, 0.0),
    "cola": (20_000, 1e-5, 0.2, 0.2),
    "qnli": (60_000, 0.0, 0.5, 0.5),
    "qqp": (40_000, 1e-5, 0.5, 0.5),
    "rte": (15_000, 0.0, 0.5, 0.1),
    "stsb": (10_000, 1e-5, 0.5, 0.5),
}


@pytest.mark.parametrize("task", BASE)
def test_glue_is_the_papers_whole_table(task: str) -> None:
    base = settings_of(f"glue-roberta-base/{task}")
    assert (base.max_steps, base.learning_rate, base.outer_weight_decay) == BASE[task]
    assert (base.orthogonality, base.weight_decay, base.max_length) == (1e-5, 0.1, 512)
    large = settings_of(f"glue-roberta-large/{task}")
    found = (large.max_steps, large.orthogonality, large.weight_decay)
    assert (*found, large.outer_weight_decay) == LARGE[task]
    assert (large.learning_rate, large.max_length) == (1e-5, 128)


def test_the_authors_script_retrains_longer_at_a_lower_rate() -> None:
    settings = settings_of("glue-roberta-base/cola")
    assert (settings.max_steps, settings.learning_rate) == (20_000, 5e-5)
    assert (settings.retrain_max_steps, settings.retrain_learning_rate) == (
        30_000,
        3e-5,
    )


PAIR = "one %(file)s %(n)d\tanother"
NEWS = (
    '{"newid": %(n)d, "lewissplit": "TRAIN", "cgisplit": "TRAINING-SET", "title": "", '
    '"topics_attr": "YES", "topics": ["%(topic)s"], "body": "news %(n)d"}'
)
PERSON = "Aromi NNP B-NP %(iob1)s\nserves VBZ B-VP O\n%(file)s NNP B-NP O\n"
PROTEIN = "Aromi\tB-protein\nserves\tI-protein\n%(file)s\tB-DNA\nin\tO\n"
PLACE = "name[%(n)d],%(file)s %(n)d is a place"

FILES = {
    "mnli": {
        f"{part}.tsv": ("sentence1\tsentence2\tgold_label", f"{PAIR}\t%(three)s")
        for part in ("train", "dev_matched", "dev_mismatched")
    },
    "sst2": {
        f"{part}.tsv": ("sentence\tlabel", "one %(file)s %(n)d\t%(two)d")
        for part in ("train", "dev")
    },
    "mrpc": {
        f"{part}.tsv": ("#1 String\t#2 String\tQuality", f"{PAIR}\t%(two)d")
        for part in ("train", "dev")
    },
    "stsb": {
        f"{part}.tsv": ("sentence1\tsentence2\tscore", f"{PAIR}\t%(n)d.5")
        for part in ("train", "dev")
    },
    "modapte": {
        "reuters21578.jsonl": ("", f"{NEWS}\n{NEWS.replace('TRAIN', 'TEST', 1)}")
    },
    "conll2003": {f"eng.{part}": ("", PERSON) for part in ("train", "testa", "testb")},
    "bionlp": {
        f"{name}.iob2": ("", PROTEIN) for name in ("Genia4ERtask1", "Genia4EReval1")
    },
    "e2e": {
        f"{part}.csv": ("mr,ref", PLACE)
        for part in ("trainset", "devset", "testset_w_refs")
    },
    "bbp": {
        "train.csv": ("sequence,label", "MKT%(residue)s,%(two)d"),
        "test.csv": ("sequence,label", "GAV%(residue)s,%(two)d"),
    },
    "thermostability": {
        f"{name}.fasta": ("", f">{name}%(n)d\n{start}%(residue)s")
        for name, start in (("cold", "MKT"), ("hot", "GAV"))
    },
    "mic": {"mic.csv": ("sequence,label", "MKT%(residue)s,%(n)d.5")},
}
"""Head and line, of which there are ten, of the files of each data set in its layout."""

OUTPUTS = {
    **{"mnli": 3, "sst2": 2, "mrpc": 2, "stsb": 1},
    **{"bbp": 2, "thermostability": 2, "mic": 1},
    "modapte": 2,  # topics
    "conll2003": 3,  # O, and two for the one type
    "bionlp": 5,  # O, and two for each of two types
    "e2e": 80,  # tokens of the vocabulary
}


def write_files(run: str, folder: Path) -> None:
    for name, (head, line) in FILES[run].items():
        lines = [
            line
            % {
                "file": name,
                "n": n,
                "two": n % 2,
                "three": ("entailment", "neutral", "contradiction")[n % 3],
                "topic": ("cocoa", "grain")[n % 2],
                "iob1": ("I-PER", "O")[n % 2],
                "residue": RESIDUES[n],
            }
            for n in range(10)
        ]
        text = "\n".join([head, *lines] if head else lines)
        (folder / name).write_text(f"{text}\n", "utf-8")


def head_of(name: str) -> tuple[Any, ...]:
    """Return what tells the models of recipes apart: the table, the head, its inputs."""
    table, run = name.split("/")
    entry = find_entry(load_recipe(name).settings.get("task", ""))
    if entry is None:
        return table, run
    pair = "text_pair_column" in entry.hints
    return table, entry.task_type, len(entry.class_names), pair


HEADS = {head_of(name): name for name in reversed(recipe_names())}
"""A recipe of each head and layout."""


def test_all_kinds_of_data_are_among_those_that_are_built() -> None:
    assert {name.split("/")[1] for name in HEADS.values()} == FILES.keys()


@pytest.mark.parametrize("name", sorted(HEADS.values()))
def test_a_tiny_model_of_its_kind_is_built(name: str, tmp_path: Path) -> None:
    recipe, run = load_recipe(name), name.split("/")[1]
    place, data = tmp_path / "model", tmp_path / "data"
    data.mkdir()
    write_files(run, data)
    config = CONFIGS[recipe.settings["model"]](**SIZES)
    auto: Any = AutoModelForCausalLM if run == "e2e" else AutoModel
    auto.from_config(config).save_pretrained(place)
    tokenizer = tokenizer_of_words()
    if recipe.settings.get("proteins"):
        tokenizer.add_tokens(list(RESIDUES))
    # As those of the real models: none gives types of tokens, which ESM does not take.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(place)
    given: dict[str, Any] = {"model": str(place)}
    if "task" in recipe.settings:
        given["data_dir"] = str(data)
    else:
        files = list(data.iterdir())
        given["task"] = str(files[0] if len(files) == 1 else data)
    settings = settings_of(name, **given)
    examples = read_examples(settings, Listener(), searches=True)
    made = prepare(
        settings,
        make_method(settings.method),
        find_model(str(place)),
        examples,
        torch.device("cpu"),
        Listener(),
    )
    assert settings.target_modules is not None
    adapted = {n.split(".lora")[0].rsplit(".", 1)[-1] for n in magnitudes(made.model)}
    assert adapted == set(settings.target_modules)
    assert len(magnitudes(made.model)) == 2 * len(settings.target_modules)  # two layers
    # One output a class, label, tag or number, and the loss that goes with it.
    batch = made.collate([made.sets["train"][i] for i in range(4)])
    with torch.no_grad():
        found = made.model(**batch)
    assert found.logits.shape[-1] == OUTPUTS[run]
    assert len(examples.schema.label_names) in (0, OUTPUTS[run])
    expected = loss_by_hand(examples.task.name, found.logits, batch["labels"])
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-5)


def loss_by_hand(kind: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if kind == "regression":
        return (logits.squeeze(-1) - labels).square().mean()
    if kind == "multilabel":
        return -torch.nn.functional.logsigmoid((2 * labels - 1) * logits).mean()
    if kind == "generation":
        logits, labels = logits[:, :-1], labels[:, 1:]
    known = labels != -100
    return -logits.log_softmax(-1)[known].gather(1, labels[known][:, None]).mean()


def test_another_method_takes_the_settings_that_mean_something_to_it() -> None:
    lora = settings_of("glue-roberta-base/cola", method="lora")
    assert (lora.method, lora.learning_rate, lora.lora_r) == ("lora", 5e-5, 4)
    assert lora.retrain_max_steps is None
    full = settings_of("glue-roberta-base/cola", method="full", max_steps=7)
    assert (full.max_steps, full.weight_decay) == (7, 0.1)


def test_data_without_a_name_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"tags-roberta-base/bionlp has no data of its"):
        settings_of("tags-roberta-base/bionlp")
    assert settings_of("tags-roberta-base/bionlp", task="x").task_type == "tagging"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("glue-robrta-base/cola", r"Did you mean glue-roberta-base/cola"),
        ("glue-roberta-base", r"Did you mean glue-roberta-base/"),
        ("cola", r"Did you mean glue-[a-z0-9-]+/cola or glue-[a-z0-9-]+/cola"),
        ("E2E", r"Did you mean e2e-gpt2-medium/"),
        ("", r"there is no recipe ''\. `--recipe help` lists all"),
    ],
)
def test_an_unknown_name_lists_the_nearest(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe(name)


def test_the_command_lists_them_and_what_is_not_from_the_source(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--recipe", "help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name}\n" in told for name in recipe_names())
    assert "Chosen here: max_length." in told


def test_options_go_before_the_recipe_and_a_model_that_is_not_there_is_told(
    labelled_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--recipe", "glue-roberta-base/cola", "--task", str(labelled_csv)]
    words += ["--output-dir", str(tmp_path / "run")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "'FacebookAI/roberta-base' cannot be fetched from the Hub" in told
    assert "run `hf download FacebookAI/roberta-base` where there is a network" in told
    assert "a new run may also take a folder" in told
    assert "all-MiniLM" not in told  # without --model it is the recipe's own
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_has_its_settings_already(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--resume", "--output-dir", str(tmp_path)]
    assert main(["train", "--recipe", "glue-roberta-base/cola", *words]) == 2
    assert "has its settings already; leave the recipe out" in capsys.readouterr().err
