"""`BiDoRAOptimizer` on plain PEFT DoRA models, with every estimator by name alone."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.metrics import f1_score
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

import bidora.optimizer
from bidora import (
    BiDoRAOptimizer,
    exact_dora_layers,
    magnitudes,
    plain_dora_layers,
)
from bidora.dora.orthogonality import orthogonality
from hypergrad import estimator_names, make_estimator
from hypergrad.estimators import Implicit
from hypergrad.solvers import CGSolver
from tests.faults import Faults, break_everywhere, content, differences

pytestmark = [
    pytest.mark.filterwarnings("ignore::hypergrad.errors.NumericalWarning"),
    # transformers' own, raised when PEFT reads its model
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def bert(seed: int = 0, dropout: float = 0.1) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_labels": 3,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    return BertForSequenceClassification(BertConfig(**settings))


def lora(**settings: Any) -> LoraConfig:
    given: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 4,
        "use_dora": True,
        "target_modules": ["query", "value"],
        "task_type": "SEQ_CLS",
        **settings,
    }
    return LoraConfig(**given)


def by_get_peft_model() -> nn.Module:
    return get_peft_model(bert(), lora()).train()


def by_add_adapter() -> nn.Module:
    model = bert()
    model.add_adapter(lora(task_type=None))
    model.classifier.requires_grad_(True)
    return model.train()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (4, 7), generator=make)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(0, 3, (4,), generator=make),
    }


def copies(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        *((name, by_get_peft_model) for name in estimator_names()),
        # How an adapter came in is nothing that an estimator sees.
        ("darts", by_add_adapter),
        ("unrolled", by_add_adapter),
    ],
)
def test_trains_a_plain_peft_model_by_name_alone(name: str, make: Any) -> None:
    model = make()
    opt = BiDoRAOptimizer(model, estimator=name)
    assert plain_dora_layers(model) == {}
    n_outer = 0
    for i in range(16):
        before = copies(magnitudes(model))
        inner = copies(opt.problem.inner_params)
        report = opt.step(batch(i), lambda i=i: batch(100 + i))
        moved = [not torch.equal(m, before[n]) for n, m in magnitudes(model).items()]
        assert all(moved) if report.outer_step else not any(moved)
        # A's gradient is 0 while B is: AdamW leaves it there in the very first step.
        stuck = [
            n for n, p in opt.problem.inner_params.items() if torch.equal(p, inner[n])
        ]
        assert not stuck or i == 0
        n_outer += report.outer_step
        assert report.skipped is None
    lookback = opt.estimator.needs.lookback
    assert n_outer == len([i for i in range(10, 17) if i % max(4, lookback) == 0])


def test_levels_are_magnitudes_outside_and_the_rest_inside() -> None:
    model = by_get_peft_model()
    opt = BiDoRAOptimizer(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(opt.problem.outer_params) == set(magnitudes(model))
    assert set(opt.problem.inner_params) == trainable - set(magnitudes(model))
    assert any("classifier" in n for n in opt.problem.inner_params)
    assert not any("original_module" in n for n in opt.problem.inner_params)


def test_language_model_with_conv1d_layers() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    peft = LoraConfig(
        r=2,
        use_dora=True,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(GPT2LMHeadModel(config), peft).train()
    opt = BiDoRAOptimizer(model, "cg", outer_every=1, outer_warmup=0)
    ids = torch.randint(0, 40, (3, 9))
    before = copies(magnitudes(model))
    report = opt.step(
        {"input_ids": ids, "labels": ids}, {"input_ids": ids, "labels": ids}
    )
    assert report.outer_step
    assert all(not torch.equal(m, before[n]) for n, m in magnitudes(model).items())


def test_loss_goes_down_on_both_levels() -> None:
    model = get_peft_model(bert(dropout=0.0), lora(r=4)).train()
    opt = BiDoRAOptimizer(
        model, "sama", inner_lr=4e-2, outer_lr=4e-2, outer_every=1, outer_warmup=2
    )
    reports = [opt.step(batch(0), batch(0)) for _ in range(30)]
    outer = [r.outer_loss for r in reports if r.outer_loss is not None]
    assert reports[0].inner_loss is not None
    assert reports[-1].inner_loss is not None
    assert reports[-1].inner_loss < 0.5 * reports[0].inner_loss
    assert outer[-1] < 0.5 * outer[0]


def test_orthogonality_joins_the_inner_loss_only() -> None:
    results = []
    for gamma in (0.0, 10.0):
        model = get_peft_model(bert(dropout=0.0), lora()).train()
        opt = BiDoRAOptimizer(
            model,
            "first-order",
            orthogonality=gamma,
            inner_lr=0.0,
            outer_every=1,
            outer_warmup=0,
        )
        term = float(orthogonality(model).detach())
        results.append((opt.step(batch(0), batch(0)), term))
    (plain, term), (with_term, _) = results
    assert term > 0
    assert with_term.inner_loss == pytest.approx(plain.inner_loss + 10 * term, rel=1e-5)
    assert with_term.outer_loss == plain.outer_loss


def test_freezing_magnitudes() -> None:
    model = by_get_peft_model()
    opt = BiDoRAOptimizer(model, "darts", outer_every=1, outer_warmup=0)
    opt.step(batch(0), batch(1))
    before = copies(magnitudes(model))
    opt.freeze_magnitudes()
    for i in range(3):
        assert not opt.step(batch(i), batch(1)).outer_step
    assert all(torch.equal(m, before[n]) for n, m in magnitudes(model).items())


def test_scheduler_and_own_optimizers() -> None:
    model = by_get_peft_model()
    opt = BiDoRAOptimizer(
        model,
        "sama",
        inner_optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        outer_optimizer=partial(torch.optim.Adam, lr=0.01),
        outer_every=1,
        outer_warmup=0,
        max_grad_norm=1.0,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5**t)
    opt.step(batch(0), batch(1))
    scheduler.step()
    assert [g["lr"] for g in opt.param_groups] == [0.05, 0.005]
    assert opt.step(batch(0), batch(1)).outer_step


def test_what_is_left_open_follows_the_inner_level() -> None:
    opt = BiDoRAOptimizer(by_get_peft_model(), inner_lr=0.3, inner_weight_decay=0.2)
    assert [(g["lr"], g["weight_decay"]) for g in opt.param_groups] == [(0.3, 0.2)] * 2
    assert (opt.estimator.name, opt.outer_every, opt.outer_warmup) == ("darts", 4, 10)
    own = BiDoRAOptimizer(by_get_peft_model(), outer_lr=0.4, outer_weight_decay=0.0)
    assert [g["lr"] for g in own.param_groups] == [5e-4, 0.4]
    assert [g["weight_decay"] for g in own.param_groups] == [0.1, 0.0]
    six = make_estimator("unrolled", num_steps=6)
    assert BiDoRAOptimizer(by_get_peft_model(), six).outer_every == 6


def test_the_usual_weight_of_the_orthogonality_term() -> None:
    """1e-5 of the term; none where curvature has no place for it."""
    losses = {}
    for gamma in (0.0, None, 1e-5):
        model = get_peft_model(bert(dropout=0.0), lora(r=4)).train().double()
        opt = BiDoRAOptimizer(model, "first-order", orthogonality=gamma)
        losses[gamma] = opt.step(batch(0)).inner_loss
    assert losses[None] == losses[1e-5] != losses[0.0]
    newton = Implicit(CGSolver(8), curvature="gauss-newton")
    model = get_peft_model(bert(dropout=0.0), lora(r=4)).train().double()
    assert BiDoRAOptimizer(model, newton).step(batch(0)).inner_loss == losses[0.0]


@pytest.mark.parametrize("name", ["neumann", "unrolled"])
def test_resume_is_exact_with_dropout_on(name: str) -> None:
    def run(opt: BiDoRAOptimizer, start: int, end: int) -> None:
        for i in range(start, end):
            opt.step(batch(i), batch(100 + i))

    straight = by_get_peft_model()
    whole = BiDoRAOptimizer(straight, name, outer_warmup=3)
    torch.manual_seed(1)
    run(whole, 0, 12)

    model = by_get_peft_model()
    first = BiDoRAOptimizer(model, name, outer_warmup=3)
    torch.manual_seed(1)
    run(first, 0, 7)
    saved = copy.deepcopy((model.state_dict(), first.state_dict()))
    rng = torch.get_rng_state()
    resumed = by_get_peft_model()
    second = BiDoRAOptimizer(resumed, name, outer_warmup=3)
    resumed.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    torch.set_rng_state(rng)
    run(second, 7, 12)
    for n, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[n]), n


def test_readme_loop_keeps_peft_settings_the_user_chose() -> None:
    from bidora import use_exact_dora

    model = by_get_peft_model()
    use_exact_dora(model, dropout="peft")
    layers = exact_dora_layers(model)
    BiDoRAOptimizer(model)
    assert exact_dora_layers(model) == layers


def test_the_outer_loss_may_be_a_metric_without_a_derivative() -> None:
    model = by_get_peft_model()

    def minus_f1(model: Any, batch: Any) -> torch.Tensor:
        said = model(**batch).logits.argmax(-1).tolist()
        score = f1_score(batch["labels"].tolist(), said, average="macro")
        return torch.tensor(-float(score))

    opt = BiDoRAOptimizer(
        model,
        make_estimator("zeroth-order", num_steps=1, radius=0.5),
        outer_loss_fn=minus_f1,
        outer_every=1,
        outer_warmup=0,
    )
    before = [m.detach().clone() for m in magnitudes(model).values()]
    reports = [opt.step(batch(i), batch(10)) for i in range(4)]
    for report in reports:
        assert report.outer_loss is not None
        assert -1 <= report.outer_loss <= 0
    after = magnitudes(model).values()
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_step_that_fails_anywhere_changes_nothing() -> None:
    """At each loss, backward pass and optimizer step: an error, Ctrl-C, out of memory."""

    def make(faults: Faults) -> Any:
        model = by_get_peft_model()
        opt = BiDoRAOptimizer(
            model,
            make_estimator("neumann", num_terms=1, damping=10.0),
            loss_fn=faults.loss(lambda model, b: faults.watch(model(**b).loss)),
            outer_every=1,
            outer_warmup=0,
            orthogonality=1e-3,
        )
        faults.mess = model.eval
        faults.steps(opt.inner, "inner")
        faults.steps(opt.outer, "outer")
        for i in range(2):
            opt.inner_step(batch(i))
        return opt.problem, opt

    places = break_everywhere(make, lambda p, opt: opt.step(batch(2), batch(3)))
    assert sum(place.endswith(" step") for place in places) == 6


def test_a_row_without_a_norm_undoes_the_inner_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_norm(model: nn.Module) -> None:
        raise ValueError("a row has no norm")

    opt = BiDoRAOptimizer(by_get_peft_model(), "darts", outer_every=1, outer_warmup=0)
    opt.step(batch(0), batch(1))
    before = content(opt.problem, opt)
    with monkeypatch.context() as patch:
        patch.setattr(bidora.optimizer, "check_norms", no_norm)
        with pytest.raises(ValueError, match="no norm"):
            opt.step(batch(2), batch(3))
    assert not differences(before, content(opt.problem, opt))
    assert opt.step(batch(2), batch(3)).outer_step


# -- what a user can get wrong ----------------------------------------------------------


def test_no_dora_says_how_to_make_one() -> None:
    with pytest.raises(ValueError, match=r"LoraConfig\(use_dora=True"):
        BiDoRAOptimizer(bert())
    with pytest.raises(ValueError, match=r"no DoRA magnitudes"):
        BiDoRAOptimizer(get_peft_model(bert(), lora(use_dora=False)))


def test_frozen_magnitudes_say_how_to_thaw_them() -> None:
    model = by_get_peft_model()
    for m in magnitudes(model).values():
        m.requires_grad_(False)
    with pytest.raises(ValueError, match=r"are frozen.*is_trainable=True"):
        BiDoRAOptimizer(model)


def test_two_trainable_adapters_are_refused() -> None:
    model = get_peft_model(bert(), lora())
    model.add_adapter("second", lora())
    for m in magnitudes(model).values():
        m.requires_grad_(True)
    with pytest.raises(ValueError, match=r"several adapters.*'default', 'second'"):
        BiDoRAOptimizer(model)


def test_trainable_base_weights_are_listed_and_refused_unless_allowed() -> None:
    model = by_get_peft_model()
    for n, p in model.named_parameters():
        if "layer.0.output.dense.bias" in n:
            p.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"1 base weights are trainable \(.*dense\.bias"
    ):
        BiDoRAOptimizer(model)
    opt = BiDoRAOptimizer(model, allow_base_weights=True)
    assert any("output.dense.bias" in n for n in opt.problem.inner_params)


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_a_new_frozen_head_is_named(how: str) -> None:
    model: nn.Module = bert()
    if how == "get_peft_model":
        model = get_peft_model(bert(), lora(task_type=None))
    else:
        model.add_adapter(lora(task_type=None))
    with pytest.warns(
        UserWarning, match=r"frozen \(.*classifier\.weight.*modules_to_save"
    ):
        BiDoRAOptimizer(model)


def test_a_trained_head_is_not_complained_about(
    tmp_path: Any, recwarn: pytest.WarningsRecorder
) -> None:
    bert().save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    model.add_adapter(lora(task_type=None))
    BiDoRAOptimizer(model)
    assert not [w for w in recwarn if "newly initialised" in str(w.message)]


def test_declining_the_exact_forward_warns_with_the_measured_error() -> None:
    model = by_get_peft_model()
    with pytest.warns(UserWarning, match=r"off by 650 %"):
        BiDoRAOptimizer(model, exact=False)
    assert exact_dora_layers(model) == {}


def test_a_batch_without_labels() -> None:
    opt = BiDoRAOptimizer(by_get_peft_model())
    without = {k: v for k, v in batch().items() if k != "labels"}
    with pytest.raises(ValueError, match=r"no loss.*'labels', perhaps.*attention_mask"):
        opt.step(without)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"orthogonality": -1.0}, r"orthogonality=-1\.0 must be"),
        ({"estimator": "newton"}, "'newton' is unknown; choose one of auto, cg"),
        ({"dropout": "none"}, "dropout"),
        ({"inner_lr": -1.0}, "learning rate"),
    ],
)
def test_settings_out_of_range(settings: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BiDoRAOptimizer(by_get_peft_model(), **settings)


def test_an_adapter_added_later_becomes_exact_at_the_next_outer_step() -> None:
    model = get_peft_model(bert(), lora()).train()
    opt = BiDoRAOptimizer(model, "darts", outer_every=1, outer_warmup=0)
    model.add_adapter("later", lora())
    assert plain_dora_layers(model)
    model.set_adapter("default")
    opt.step(batch(0), batch(1))
    assert not plain_dora_layers(model)


@pytest.mark.parametrize("head", ["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "regression"])
def test_gauss_newton_scores_what_the_model_scores(head: str) -> None:
    """The criterion is compared with the loss at the first product; none is negative."""
    torch.manual_seed(0)
    ids = torch.randint(5, 50, (4, 6))
    target = ["query", "value"]
    if head == "CAUSAL_LM":
        config = GPT2Config(
            vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2
        )
        base: Any = GPT2LMHeadModel(config)
        target, labels = ["c_attn"], ids.clone()
        labels[0, :2] = -100
    elif head == "TOKEN_CLS":
        base = BertForTokenClassification(bert().config)
        labels = torch.randint(0, 3, (4, 6))
        labels[1, 3:] = -100
    else:
        base = bert()
        labels = torch.randint(0, 3, (4,))
        if head == "regression":
            config = bert().config
            config.num_labels = 1
            base, labels = BertForSequenceClassification(config), torch.randn(4)
    kind = "SEQ_CLS" if head == "regression" else head
    model = get_peft_model(base, lora(target_modules=target, task_type=kind)).eval()
    opt = BiDoRAOptimizer(
        model,
        Implicit(CGSolver(8, damping=1e-3), curvature="gauss-newton"),
        outer_every=1,
        outer_warmup=0,
    )
    batch = {"input_ids": ids, "labels": labels}
    opt.step(batch, batch)
    report = opt.step(batch, batch)
    assert report.outer_step
    assert report.info is not None
    assert report.info.curvature is not None
    # Convex criteria: positive semi-definite to the rounding of float32.
    lowest, highest = report.info.curvature
    assert lowest > -1e-5 * highest
    assert report.info.damping == 1e-3


def test_gauss_newton_has_no_place_for_the_orthogonality_term() -> None:
    model = get_peft_model(bert(), lora())
    estimator = Implicit(CGSolver(8), curvature="gauss-newton")
    with pytest.raises(
        ValueError, match=r"orthogonality=0\.1 with .*Set orthogonality=0"
    ):
        BiDoRAOptimizer(model, estimator, orthogonality=0.1)
    BiDoRAOptimizer(model, estimator)


def test_an_audit_leaves_the_training_alone() -> None:
    runs = []
    for every in (None, 2):
        torch.manual_seed(0)
        model = get_peft_model(bert(), lora()).train()
        opt = BiDoRAOptimizer(
            model, "darts", outer_every=1, outer_warmup=0, audit_every=every
        )
        audits = []
        for k in range(4):
            batch = {
                "input_ids": torch.randint(0, 50, (4, 6)),
                "labels": torch.tensor([0, 1, 2, k % 3]),
            }
            audits.append(opt.step(batch, batch).audit)
        runs.append((audits, {n: p.clone() for n, p in model.named_parameters()}))
    (none, plain), (audits, audited) = runs
    assert none == [None] * 4
    assert [audit is not None for audit in audits] == [False, True, False, True]
    audit = audits[1]
    assert audit is not None
    assert audit.reference == "unrolled"
    assert audit.cosine is not None
    assert -1 <= audit.cosine <= 1
    assert all(torch.equal(p, audited[n]) for n, p in plain.items())
