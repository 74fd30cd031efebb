"""The classifier: padding changes nothing, frozen weights stay, cached states are right."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from support import features
from support.checkpoint import load_weights, save_weights
from support.classify import (
    POOLINGS,
    Batches,
    GPTForClassification,
    by_length,
    class_loss,
    encode,
    freeze,
    layers,
    occlusion,
    pad,
    predict,
)
from support.features import bottom, cached_states, hidden_states, top
from support.gpt import GPTConfig, GPTModel, count_parameters
from support.llama import LlamaConfig, LlamaModel
from support.pretrained import export, load
from support.train import TrainConfig, train

CONFIGS = {
    "gpt2": GPTConfig(61, 24, d_model=32, n_heads=4, n_layers=3),
    "llama": LlamaConfig(61, 24, d_model=32, n_heads=4, n_kv_heads=2, n_layers=3, d_ff=48),
}
MODELS = {"gpt2": GPTModel, "llama": LlamaModel}
ROWS = [[5, 9, 2, 7, 7, 1], [3], [60, 0, 12], [8, 8, 8, 8, 8, 8, 8, 8, 8], [1, 2]]


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


def language_model(kind, seed=0):
    torch.manual_seed(seed)
    model = MODELS[kind](CONFIGS[kind]).eval()
    with torch.no_grad():  # far from its first state, in which all answers are nearly alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def classifier(kind, pooling="last", num_classes=3):
    model = language_model(kind)
    torch.manual_seed(1)
    return GPTForClassification.from_pretrained(model, num_classes, pooling)


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_on_the_right_changes_no_answer(kind, pooling):
    model = classifier(kind, pooling)
    alone = torch.cat([model(torch.tensor([row])) for row in ROWS])
    inputs, mask = pad(ROWS)
    for filler in (0, 60):  # whatever stands in the padding
        same(model(inputs.masked_fill(~mask, filler), mask), alone)
    same(model(F.pad(inputs, (0, 9), value=4), F.pad(mask, (0, 9))), alone)
    same(model(inputs, mask.long()), alone)
    same(predict(model, ROWS), alone.softmax(dim=-1))
    assert alone.std(dim=0).min() > 0.05


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_answer_is_the_heads_on_what_the_backbone_gives(kind, pooling):
    language, model = language_model(kind), classifier(kind, pooling)
    language.head = torch.nn.Identity()
    for row, logits in zip(ROWS, model(*pad(ROWS)), strict=True):
        (states,) = language(torch.tensor([row]))  # (T, C)
        pooled = {"last": states[-1], "mean": states.mean(dim=0), "first": states[0]}[pooling]
        same(model.backbone.head(pooled), logits)


def test_any_classes_any_batch_and_weights_of_its_own(kind):
    language = language_model(kind)
    before = {name: weight.clone() for name, weight in language.state_dict().items()}
    model = GPTForClassification.from_pretrained(language, 7)
    assert model(torch.tensor([[3, 1]])).shape == (1, 7) and not model.training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], weight) for name, weight in language.state_dict().items())
    fresh = GPTForClassification(CONFIGS[kind], 2)
    assert type(fresh.backbone) is MODELS[kind]
    head = language.head.weight.numel() if not CONFIGS[kind].tie_weights else 0
    assert count_parameters(fresh) == count_parameters(language) - head + 2 * 32 + 2


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        ([[0, 1, 1], [1, 1, 1]], "left"),
        ([[1, 0, 1], [1, 1, 1]], "a hole"),
        ([[1, 1, 1], [0, 0, 0]], "nothing real"),
    ],
)
def test_a_mask_that_is_not_padding_on_the_right_is_refused(mask, why):
    with pytest.raises(ValueError, match="real tokens first, at least one, then padding"):
        classifier("gpt2")(torch.tensor([[1, 2, 3]] * 2), torch.tensor(mask))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GPTForClassification(CONFIGS["gpt2"], 1), "num_classes=1"),
        (lambda: GPTForClassification(CONFIGS["gpt2"], 2, "max"), "'max' must be one of last"),
        (lambda: classifier("llama")(torch.zeros(1, 25, dtype=int)), "25 tokens exceed"),
        (lambda: Batches(ROWS, [0] * 5, 6), "5 rows, 5 labels and batch_size=6"),
        (lambda: Batches(ROWS, [0] * 4, 2), "4 labels"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_empty_text_has_a_token_and_a_long_one_is_cut():
    class Letters:
        def encode(self, text):
            return list(text.encode())

    assert encode(["abc", ""], Letters(), 2) == [[97, 98], [32]]


# ---- learning -----------------------------------------------------------------------------------

LEARN = TrainConfig(steps=30, batch_size=4, lr=3e-3, weight_decay=0.0)
MANY = [[i, (7 * i) % 61, *range(i % 5), 1 + i % 2] for i in range(40)]
LABELS = [i % 2 for i in range(40)]


@pytest.mark.parametrize("learning", [0, 1, 2, None])
def test_only_what_is_not_frozen_changes(kind, learning):
    model = classifier(kind, num_classes=2)
    freeze(model, learning)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    table = layers(model)
    assert table.parameters.sum() == count_parameters(model)
    wanted = ["block 3", "block 2", "block 1"][: 3 if learning is None else learning]
    wanted += ["head"] + ["ln"] * (learning != 0) + [list(table.index)[0]] * (learning is None)
    assert set(table.index[table.learning > 0]) == set(wanted)
    assert (table.learning.isin([0]) | (table.learning == table.parameters)).all()
    log = train(model, Batches(MANY, LABELS, 4), LEARN, loss=class_loss)
    assert log.loss.iloc[-5:].mean() < log.loss.iloc[:5].mean()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == (not weight.requires_grad), name


def test_every_row_comes_once_an_epoch_and_a_batch_depends_on_its_step_alone():
    rows = [[i] * (1 + i % 7) for i in range(23)]
    batches = Batches(rows, list(range(23)), 5, seed=3)
    assert len(batches) == 4
    epochs = [[batches(step) for step in range(4 * e, 4 * e + 4)] for e in (0, 1)]
    seen = [torch.cat([labels for *_, labels in epoch]).tolist() for epoch in epochs]
    assert all(len(set(labels)) == 20 for labels in seen) and seen[0] != seen[1]
    for inputs, mask, labels in sum(epochs, []):
        assert mask.sum(dim=1).tolist() == sorted((1 + labels % 7).tolist(), reverse=True)
        assert (inputs[mask] == labels[:, None].expand(mask.shape)[mask]).all()
    again = Batches(rows, list(range(23)), 5, seed=3)
    assert torch.equal(again(6)[2], epochs[1][2][2])
    assert not torch.equal(Batches(rows, list(range(23)), 5, seed=4)(0)[2], epochs[0][0][2])


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 5.0, 0.5])])
def test_the_loss_is_that_of_torch_and_micro_batches_add_up(kind, weights):
    model, (inputs, mask) = classifier(kind), pad(ROWS)
    labels = torch.tensor([2, 1, 0, 1, 1])
    total, n = class_loss(model, inputs, mask, labels, weights)
    same(total / n, F.cross_entropy(model(inputs, mask), labels, weights))
    parts = [
        class_loss(model, inputs[i : i + 2], mask[i : i + 2], labels[i : i + 2], weights)
        for i in (0, 2, 4)
    ]
    same(sum(t for t, _ in parts), total)
    assert sum(n for _, n in parts) == pytest.approx(n)


def test_batches_by_length_hold_every_row_once():
    rows = [[0] * n for n in (3, 50, 1, 7, 7, 20, 3, 90)]
    batches = list(by_length(rows, max_tokens=21))
    assert sorted(sum(batches, [])) == list(range(8))
    assert all(len(b) == 1 or len(b) * max(len(rows[i]) for i in b) <= 21 for b in batches)
    assert len(batches) < 8


# ---- in two parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_bottom_and_top_together_are_the_model(kind, at, pooling):
    model, (inputs, mask) = classifier(kind, pooling), pad(ROWS)
    low, high = bottom(model, at), top(model, at)
    assert torch.equal(high(low(inputs), mask), model(inputs, mask))
    assert (len(low.blocks), high.config.n_layers) == (at, 3 - at)
    middle = bottom(top(model, 1), 1)
    same(top(model, 2)(middle(bottom(model, 1)(inputs)), mask), model(inputs, mask))


def test_the_top_learns_what_the_whole_would_and_the_model_knows_it(kind):
    whole, parts = classifier(kind, num_classes=2), classifier(kind, num_classes=2)
    freeze(whole, 1)
    freeze(parts, 1)
    states = hidden_states(bottom(parts, 2), MANY)
    for model, rows in ((whole, MANY), (top(parts, 2), states)):
        train(model, Batches(rows, LABELS, 4), LEARN, loss=class_loss)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        same(a, b, 1e-4)
    same(predict(top(parts, 2), states), predict(parts, MANY))


def test_a_trained_top_is_saved_and_put_into_another_model(kind, tmp_path):
    model, other = classifier(kind), classifier(kind)
    with torch.no_grad():
        for parameter in top(model, 2).parameters():
            parameter.add_(torch.randn_like(parameter))
    save_weights(top(model, 2), tmp_path / "top.safetensors")
    assert (predict(model, ROWS) - predict(other, ROWS)).abs().max() > 0.01
    load_weights(top(other, 2), tmp_path / "top.safetensors")
    assert torch.equal(predict(model, ROWS), predict(other, ROWS))


def test_a_gpt2_in_a_folder_will_do(tmp_path):
    export(language_model("gpt2"), None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2"
    model = GPTForClassification.from_pretrained(load(tmp_path)[0], 2)
    freeze(model, 1)
    states = cached_states(bottom(model, 2), MANY, tmp_path / "cache")
    log = train(top(model, 2), Batches(states, LABELS, 4), LEARN, loss=class_loss)
    assert log.loss.iloc[-5:].mean() < log.loss.iloc[:5].mean()
    same(predict(top(model, 2), states), predict(model, MANY), 1e-3)


# ---- the cache ----------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Count how often the states are really computed."""
    calls = []

    def count(*arguments):
        calls.append(1)
        return hidden_states(*arguments)

    monkeypatch.setattr(features, "hidden_states", count)
    return calls


def test_states_are_computed_once_and_are_those_of_the_model(kind, tmp_path, counted):
    model = bottom(classifier(kind), 2)
    first = cached_states(model, ROWS, tmp_path)
    again = cached_states(model, ROWS, tmp_path)
    assert len(counted) == 1 and len(list(tmp_path.iterdir())) == 1
    for row, a, b in zip(ROWS, first, again, strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32
        same(a, model(torch.tensor([row]))[0], 4e-3)  # float16 has three digits


def test_another_model_other_rows_or_fewer_blocks_are_computed_anew(kind, tmp_path, counted):
    model = classifier(kind)
    cached_states(bottom(model, 2), ROWS, tmp_path)
    cached_states(bottom(model, 1), ROWS, tmp_path)
    cached_states(bottom(model, 2), ROWS[::-1], tmp_path)
    cached_states(bottom(model, 2), [ROWS[0] + ROWS[1], *ROWS[2:]], tmp_path)
    with torch.no_grad():
        model.backbone.blocks[1].ff.down.weight[0, 0] += 1e-6
    cached_states(bottom(model, 2), ROWS, tmp_path)
    assert len(counted) == len(list(tmp_path.iterdir())) == 5
    with torch.no_grad():
        model.backbone.head.weight.zero_()  # above the cut: the states stay as they are
    cached_states(bottom(model, 2), ROWS, tmp_path)
    assert len(counted) == 5
    states = cached_states(bottom(model, 1), ROWS, tmp_path)  # and from states, not from ids
    cached_states(bottom(top(model, 1), 1), states, tmp_path)
    cached_states(bottom(top(model, 1), 1), states, tmp_path)
    states[3][5, 7] += 0.1
    cached_states(bottom(top(model, 1), 1), states, tmp_path)
    assert len(counted) == 7


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def put_another_ones(path):
    tensors = load_file(path)
    save_file(tensors, path, {"key": "of another model"})


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_byte,
        put_another_ones,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no safetensors"),
        lambda path: save_file({"other": torch.zeros(1)}, path),
    ],
)
def test_a_damaged_or_foreign_file_is_never_used(damage, tmp_path, counted):
    model = bottom(classifier("llama"), 2)
    first = cached_states(model, ROWS, tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    again = cached_states(model, ROWS, tmp_path)
    assert len(counted) == 2 and all(map(torch.equal, first, again))
    cached_states(model, ROWS, tmp_path)
    assert len(counted) == 2  # the file was put in order


def test_nothing_is_left_behind_by_a_run_that_was_stopped(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "hidden_states", stop)
    with pytest.raises(KeyboardInterrupt):
        cached_states(bottom(classifier("llama"), 2), ROWS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_states_too_large_for_float16_are_refused(tmp_path):
    model = classifier("llama")
    with torch.no_grad():
        model.backbone.tok_emb.weight.fill_(1e6)
    with pytest.raises(ValueError, match="too large for float16"):
        cached_states(bottom(model, 1), ROWS, tmp_path)


# ---- why ----------------------------------------------------------------------------------------


def test_occlusion_leaves_out_each_word_in_turn():
    asked = []

    def score(texts):
        asked.extend(texts)
        return [text.count("free") + 0.5 * text.count("win") for text in texts]

    assert occlusion("win a  free win", score) == [
        ("win", 0.5),
        ("a", 0),
        ("free", 1),
        ("win", 0.5),
    ]
    assert asked == ["win a  free win", "a free win", "win free win", "win a win", "win a free"]
    assert occlusion("free", lambda texts: [len(text) for text in texts]) == [("free", 4)]
    assert occlusion("", lambda texts: [0.5] * len(texts)) == []
    assert math.isclose(
        occlusion("a b", lambda texts: torch.tensor([0.5, 0.2, 0.9]))[1][1], -0.4, abs_tol=1e-6
    )
