import math

import pytest
import torch
from torch import nn

from realm_fast import optim
from realm_fast.errors import TrainingDivergedError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.LayerNorm = nn.LayerNorm(4)
        self.words = nn.Embedding(7, 4)
        self.out_bias = nn.Parameter(torch.zeros(4))

    def forward(self, ids):
        return self.LayerNorm(self.dense(self.words(ids))) + self.out_bias


def named(optimizer, name):
    (group,) = [g for g in optimizer.param_groups if g["name"] == name]
    return group["param_names"]


def test_groups_decay_only_weights_outside_layer_norm():
    optimizer = optim.build_optimizer({"reader": (Model(), 1e-3)}, weight_decay=0.1)
    assert named(optimizer, "reader.decay") == ["reader.dense.weight", "reader.words.weight"]
    assert sorted(named(optimizer, "reader.no_decay")) == [
        "reader.LayerNorm.bias",
        "reader.LayerNorm.weight",
        "reader.dense.bias",
        "reader.out_bias",
    ]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]


def test_shared_and_frozen_parameters_are_trained_once_or_not():
    first, second = Model(), Model()
    second.words = first.words
    second.dense.weight.requires_grad_(False)
    optimizer = optim.build_optimizer({"a": (first, 1.0), "b": (second, 2.0)}, weight_decay=0.1)
    everything = [n for g in optimizer.param_groups for n in g["param_names"]]
    assert "a.words.weight" in everything
    assert not {"b.words.weight", "b.dense.weight"} & set(everything)
    assert [g["name"] for g in optimizer.param_groups] == ["a.decay", "a.no_decay", "b.no_decay"]


def test_nothing_trainable_is_an_error():
    model = Model().requires_grad_(False)
    with pytest.raises(ValueError, match="modules: none of reader"):
        optim.build_optimizer({"reader": (model, 1e-3)}, weight_decay=0.0)


def test_decay_moves_weights_and_leaves_biases_without_gradient():
    model = Model()
    nn.init.ones_(model.dense.bias)
    optimizer = optim.build_optimizer({"reader": (model, 0.5)}, weight_decay=0.1)
    before = model.dense.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.dense.weight.detach(), before * (1 - 0.5 * 0.1))
    assert (model.dense.bias == 1).all()
    assert (model.LayerNorm.weight == 1).all()


def test_schedule_by_hand():
    factors = [optim.learning_rate_factor(s, warmup_steps=4, total_steps=10) for s in range(1, 12)]
    assert factors == [1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0]
    assert [optim.learning_rate_factor(s, warmup_steps=0, total_steps=4) for s in (1, 2, 3, 4, 5)] == [
        1,
        3 / 4,
        2 / 4,
        1 / 4,
        0,
    ]
    assert optim.learning_rate_factor(1, warmup_steps=0, total_steps=1) == 1
    assert optim.learning_rate_factor(3, warmup_steps=3, total_steps=3) == 1
    assert optim.learning_rate_factor(7, warmup_steps=10, total_steps=5) == 0.7
    with pytest.raises(ValueError, match="steps count from 1"):
        optim.learning_rate_factor(0, warmup_steps=0, total_steps=4)


@pytest.mark.parametrize(
    ("setting", "steps", "expected"),
    [
        (-1, 200_000, 10_000),
        (-1, 5_000, 500),
        (-1, 300, 100),
        (-1, 50, 25),
        (-1, 1, 0),
        (7, 50, 7),
        (0, 50, 0),
    ],
)
def test_pretrain_warmup(setting, steps, expected):
    assert optim.pretrain_warmup_steps(setting, steps) == expected


@pytest.mark.parametrize(("setting", "steps", "expected"), [(-1, 1000, 100), (-1, 5, 0), (3, 1000, 3)])
def test_finetune_warmup(setting, steps, expected):
    assert optim.finetune_warmup_steps(setting, steps) == expected


def test_set_learning_rates_by_module():
    optimizer = optim.build_optimizer(
        {"reader": (Model(), 4e-3), "embedder": (Model(), 2e-3)}, weight_decay=0.1
    )
    rates = optim.set_learning_rates(optimizer, 1, warmup_steps=4, total_steps=8)
    assert rates == {"reader": 1e-3, "embedder": 5e-4}
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-3, 5e-4, 5e-4]


def test_clip_returns_the_norm_and_scales_like_torch():
    model, twin = Model(), Model()
    twin.load_state_dict(model.state_dict())
    for m in (model, twin):
        (m(torch.arange(5)).square().sum() * 100).backward()
    optimizer = optim.build_optimizer({"reader": (model, 1e-3)}, weight_decay=0.0)
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    assert optim.clip_gradients(optimizer, 0.5, 1) == pytest.approx(float(expected), rel=1e-6)
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    small = optim.clip_gradients(optimizer, 0.5, 2)
    assert small == pytest.approx(0.5, rel=1e-5)
    kept = model.dense.weight.grad.clone()
    assert optim.clip_gradients(optimizer, 0.0, 3) == pytest.approx(0.5, rel=1e-5)
    assert torch.equal(model.dense.weight.grad, kept)


def test_clip_without_gradients_is_zero():
    assert (
        optim.clip_gradients(optim.build_optimizer({"r": (Model(), 1e-3)}, weight_decay=0.0), 1.0, 1) == 0.0
    )


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_clip_names_step_group_and_parameter_of_the_first_bad_gradient(poison):
    reader, embedder = Model(), Model()
    optimizer = optim.build_optimizer(
        {"reader": (reader, 1e-3), "embedder": (embedder, 1e-3)}, weight_decay=0
    )
    for model in (reader, embedder):
        model(torch.arange(5)).sum().backward()
    embedder.dense.bias.grad[2] = poison
    untouched = reader.dense.weight.grad.clone()
    with pytest.raises(
        TrainingDivergedError, match=r"step 17.*group embedder\.no_decay, parameter embedder\.dense\.bias"
    ):
        optim.clip_gradients(optimizer, 1.0, 17)
    assert torch.equal(reader.dense.weight.grad, untouched)


def test_clip_says_when_only_the_norm_overflows():
    model = Model()
    optimizer = optim.build_optimizer({"reader": (model, 1e-3)}, weight_decay=0)
    model.dense.weight.grad = torch.full_like(model.dense.weight, 3e38)
    with pytest.raises(TrainingDivergedError, match="every gradient is finite, their norm overflows"):
        optim.clip_gradients(optimizer, 1.0, 3)


def test_check_loss():
    model = Model()
    optimizer = optim.build_optimizer({"reader": (model, 1e-3)}, weight_decay=0)
    assert optim.check_loss(torch.tensor(1.5), 1, optimizer) == 1.5
    with pytest.raises(TrainingDivergedError, match=r"step 4: the loss is nan \(every weight is finite"):
        optim.check_loss(torch.tensor(math.nan), 4, optimizer)
    with torch.no_grad():
        model.words.weight[3, 1] = math.nan
    with pytest.raises(TrainingDivergedError, match=r"group reader\.decay, parameter reader\.words\.weight"):
        optim.check_loss(torch.tensor(math.inf), 5, optimizer)
