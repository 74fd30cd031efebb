"""The loop equals the one that anyone would write with torch.optim; the schedules equal theirs."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from small_run import config, data, small_model

from support.gpt import GPTConfig, GPTModel
from support.train import (
    TrainConfig,
    bits_per_byte,
    decayed_and_not,
    evaluate,
    learning_rate,
    make_optimizer,
    token_loss,
    train,
    train_step,
)


def same(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def rates_of(scheduler, optimizer, steps):
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_equals_torchs_schedulers():
    config = TrainConfig(50, 1, lr=0.02, warmup=8, min_lr_share=0.05)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / 8, total_iters=7)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=42, eta_min=0.001)
    both = lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[8])
    rates = rates_of(both, optimizer, 50)
    assert [learning_rate(step, config) for step in range(50)] == pytest.approx(rates, abs=1e-12)


def test_trapezoid_equals_transformers_schedule():
    optimization = pytest.importorskip("transformers").optimization
    config = TrainConfig(50, 1, lr=0.02, warmup=8, min_lr_share=0.05, decay="trapezoid")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    theirs = optimization.get_wsd_schedule(
        optimizer, 8, 10, num_stable_steps=32, min_lr_ratio=0.05, decay_type="linear"
    )
    rates = rates_of(theirs, optimizer, 50)[1:] + [0.02 * (0.05 + 0.95 * 0)]  # theirs starts at 0
    ours = [learning_rate(step, config) for step in range(50)]
    assert ours[:8] == pytest.approx([0.02 * (i + 1) / 8 for i in range(8)])
    assert ours[8:] == pytest.approx(rates[7:49], abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 20])
@pytest.mark.parametrize("decay", ["cosine", "trapezoid"])
def test_every_schedule_stays_between_nothing_and_lr(decay, warmup):
    config = TrainConfig(20, 1, lr=1.0, warmup=warmup, decay=decay)
    rates = [learning_rate(step, config) for step in range(20)]
    assert max(rates) == 1 and all(0 < rate <= 1 for rate in rates)
    constant = TrainConfig(20, 1, lr=1.0, min_lr_share=1, decay=decay)
    assert {learning_rate(step, constant) for step in range(20)} == {1.0}


def test_decay_is_for_matrices_only():
    model = small_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ([names[id(p)] for p in part] for part in decayed_and_not(model))
    assert all(name.endswith("weight") and ".ln" not in name for name in decayed)
    assert others == [n for n in names.values() if "ln" in n or n.endswith("bias")]
    assert len(decayed) + len(others) == len(names)
    model.head.weight.requires_grad_(False)  # tied: neither learns
    assert sum(map(len, decayed_and_not(model))) == len(names) - 1


@pytest.mark.parametrize("clip", [0.3, None])
@pytest.mark.parametrize("decay", ["cosine", "trapezoid"])
def test_the_loop_equals_a_reference_loop(clip, decay):
    settings = config(steps=25, lr=0.01, weight_decay=0.5, clip=clip, decay=decay, eval_every=None)
    ours, theirs = small_model(), small_model()
    log = train(ours, data, settings)
    named = dict(theirs.named_parameters())
    plain = {name for name in named if "ln" in name or name.endswith("bias")}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in named.items() if name in plain], "weight_decay": 0},
            {"params": [p for name, p in named.items() if name not in plain]},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
        weight_decay=0.5,
    )
    factor = lr_scheduler.LambdaLR(optimizer, lambda i: learning_rate(i, settings) / settings.lr)
    norms = []
    for step in range(25):
        inputs, targets = data(step)
        loss = F.cross_entropy(theirs(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf).item())
        optimizer.step()
        factor.step()
        assert log.loss[step] == pytest.approx(loss.item(), abs=2e-6)
    assert log.grad_norm.tolist() == pytest.approx(norms, abs=2e-5)
    assert max(norms) > 0.5 and log.loss[24] < log.loss[0] - 0.3
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        same(a, b, 2e-5)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 6])
def test_micro_batches_with_unequal_targets_give_the_gradient_of_the_whole(micro_batch):
    inputs, targets = data(0)
    counts = (targets != -100).sum(dim=1)
    assert counts.max() >= 2 * counts.min()
    whole, parts = small_model(), small_model()
    loss = F.cross_entropy(whole(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    optimizer = make_optimizer(parts, config())
    settings = config(micro_batch=micro_batch, clip=None)
    row = train_step(parts, optimizer, (inputs, targets), 0, settings)
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert row["tokens"] == counts.sum()
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        same(a.grad, b.grad, 1e-7)


def test_token_loss_of_tokens_and_of_classes():
    model, (inputs, targets) = small_model(), data(3)
    total, n = token_loss(model, inputs, targets)
    mean = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert n == (targets != -100).sum()
    same(total / n, mean)
    classes = torch.tensor([0, 3, -100, 5, 1, 2])
    total, n = token_loss(lambda ids: model(ids)[:, -1], inputs, classes)
    assert n == 5
    same(total, F.cross_entropy(model(inputs)[:, -1], classes, reduction="sum"))


def test_evaluation_weighs_tokens_and_switches_dropout_off():
    model = small_model(dropout=0.5).train()
    batches = [data(0), tuple(tensor[:1, :2] for tensor in data(1)), data(2)]
    found = evaluate(model, batches)
    assert model.training and found == evaluate(model, batches)
    model.eval()
    logits = torch.cat([model(inputs).flatten(0, 1) for inputs, _ in batches])
    want = F.cross_entropy(logits, torch.cat([targets.flatten() for _, targets in batches]))
    assert found == pytest.approx(want.item(), abs=1e-6)


def test_bits_per_byte():
    # Guessing bytes blindly costs 8 bits each, however they are grouped into tokens.
    assert bits_per_byte(math.log(256), 100, 100) == pytest.approx(8)
    assert bits_per_byte(math.log(256**3), 100, 300) == pytest.approx(8)


def test_a_copy_of_the_model_is_not_needed_to_keep_a_tie():
    model = GPTModel(GPTConfig(31, 8, d_model=16, n_heads=2, n_layers=1))
    train(model, data, config(steps=2, eval_every=None))
    assert model.head.weight is model.tok_emb.weight
    assert copy.deepcopy(model).head.weight is not model.head.weight
