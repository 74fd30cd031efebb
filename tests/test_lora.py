"""LoRA: nothing changes at first, only the adapter learns, merging is equal, files are checked."""

import copy
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from support.adapter_files import load_adapter, save_adapter
from support.classify import Batches, GPTForClassification, class_loss
from support.costs import kept_for_backward, state_bytes, step_bytes, step_flops, step_seconds
from support.generate import generate
from support.gpt import GPTConfig, GPTModel, count_bytes, count_parameters
from support.llama import LlamaConfig, LlamaModel
from support.lora import (
    LoRALayer,
    LoRALinear,
    adapted,
    adapter_names,
    add_adapter,
    chosen_layers,
    count_learning,
    linear_layers,
    low_rank,
    merge_adapter,
    unmerge_adapter,
    unwrap,
    use_adapter,
)
from support.pretrained import export, load
from support.quantize import quantized
from support.step import make_optimizer
from support.train import TrainConfig, train

CONFIGS = {
    "gpt2": GPTConfig(61, 24, d_model=32, n_heads=4, n_layers=3),
    "llama": LlamaConfig(61, 24, d_model=32, n_heads=4, n_kv_heads=2, n_layers=3, d_ff=48),
}
MODELS = {"gpt2": GPTModel, "llama": LlamaModel}
IDS = torch.tensor([[5, 9, 2, 7, 7, 1], [60, 0, 12, 3, 8, 8]])
LEARN = TrainConfig(steps=25, batch_size=2, lr=1e-2)


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


def language_model(kind, seed=0):
    torch.manual_seed(seed)
    return MODELS[kind](CONFIGS[kind]).eval()


def stirred(model, name="default", seed=1):
    """Return the model with an adapter that does something."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted(model).values():
            if name in layer.adapters:
                B = layer.adapters[name].B
                B.copy_(torch.randn(B.shape, generator=draws) * 0.3)
    return model


def data(step):
    return IDS[:, :-1], IDS[:, 1:]


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ---- a layer ------------------------------------------------------------------------------------


def test_the_shapes_the_start_and_the_formula():
    layer = LoRALayer(12, 20, rank=3, alpha=6)
    assert layer.A.shape == (12, 3) and layer.B.shape == (3, 20)
    assert layer.B.abs().max() == 0 and layer.A.std() > 0.05
    x = torch.randn(2, 5, 12)
    assert torch.equal(layer(x), torch.zeros(2, 5, 20))
    nn.init.normal_(layer.B)
    same(layer(x), 6 / 3 * (x @ (layer.A @ layer.B)))
    same(layer(x), nn.functional.linear(x, layer.update()))
    assert count_parameters(layer) == 3 * (12 + 20)
    assert LoRALayer(10, 5).A.shape == (10, 8)  # a rank above a width is useless, not wrong


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0}, {"alpha": math.nan}, {"rank": -2}])
def test_ranks_and_alphas_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        LoRALayer(4, 4, **wrong)


def test_low_rank_is_the_nearest():
    torch.manual_seed(0)
    update = torch.randn(9, 14)
    S = torch.linalg.svdvals(update)
    for rank in (1, 4, 9):
        A, B = low_rank(update, rank)
        assert A.shape == (14, rank) and B.shape == (rank, 9)
        error = (update - (A @ B).T).norm()
        same(error, S[rank:].pow(2).sum().sqrt(), 1e-4)
    A, B = low_rank(update, 4)
    other = (A + 0.01 * torch.randn_like(A)) @ B
    assert (update - other.T).norm() > (update - (A @ B).T).norm()


# ---- a model ------------------------------------------------------------------------------------


def test_nothing_changes_at_the_start_bit_for_bit(kind):
    model = language_model(kind)
    before = model(IDS)
    assert torch.equal(add_adapter(model, "*")(IDS), before)
    assert (stirred(model)(IDS) - before).abs().max() > 0.1


def test_names_and_patterns(kind):
    model = language_model(kind)
    assert chosen_layers(model, "W_q") == [f"blocks.{i}.attention.W_q" for i in range(3)]
    assert chosen_layers(model, ["ff.up", "blocks.1.attention.*"])[:2] == [
        "blocks.0.ff.up",
        "blocks.1.attention.W_q",
    ]
    assert chosen_layers(model, "blocks.0.ff.down") == ["blocks.0.ff.down"]
    everything = chosen_layers(model, "*")
    assert everything == list(linear_layers(model)) and len(everything) in (18, 21)
    assert not any("head" in name or "emb" in name for name in everything)


def test_a_tied_head_is_left_alone_and_a_free_one_may_be_chosen():
    free = GPTModel(GPTConfig(61, 24, 32, 4, 1, tie_weights=False))
    assert "head" in chosen_layers(free, "*")
    with pytest.raises(ValueError, match="No linear layer is called 'head': there are blocks"):
        add_adapter(language_model("gpt2"), "head")


@pytest.mark.parametrize("target", ["q_proj", "W_", "tok_emb", "attention"])
def test_a_name_that_fits_nothing_lists_what_there_is(kind, target):
    model = language_model(kind)
    with pytest.raises(ValueError, match=rf"{target}.*blocks\.\*\.attention\.W_q, blocks\.\*\."):
        add_adapter(model, ["W_q", target])
    assert not adapted(model)  # and nothing was done


def test_names_of_adapters(kind):
    model = add_adapter(language_model(kind), "W_q")
    for name in ("default", "with.dot", ""):
        with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
            add_adapter(model, "W_q", name=name)
    with pytest.raises(ValueError, match="no adapter 'other', only: default"):
        use_adapter(model, "other")


def test_only_the_adapter_learns(kind):
    model = add_adapter(language_model(kind), ["W_q", "ff.*"], rank=2)
    layers = adapted(model).values()
    assert count_learning(model) == sum(
        2 * (m.linear.in_features + m.linear.out_features) for m in layers
    )
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    log = train(model, data, LEARN)
    assert log.loss.iloc[-1] < log.loss.iloc[0] - 0.3
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) == ("adapters" not in name), name


def test_a_new_head_may_learn_beside_the_adapter(kind, tmp_path):
    rows, labels = [[i, 7, 1 + i % 2] for i in range(40)], [i % 2 for i in range(40)]

    def classifier(seed):
        torch.manual_seed(seed)
        return GPTForClassification.from_pretrained(language_model(kind), 2)

    model = add_adapter(classifier(0), "W_v")
    model.backbone.head.requires_grad_(True)
    train(model, Batches(rows, labels, 4), TrainConfig(10, 4, 1e-2), loss=class_loss)
    assert not torch.equal(model.backbone.head.weight, classifier(0).backbone.head.weight)
    save_adapter(model, tmp_path / "spam.safetensors", also=["backbone.head"])
    other = load_adapter(classifier(5), tmp_path / "spam.safetensors")
    assert torch.equal(other(IDS), model.eval()(IDS))


# ---- merging, switching -------------------------------------------------------------------------


def test_merged_logits_are_equal_and_unmerging_is_exact(kind):
    model = language_model(kind)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    stirred(add_adapter(model, "*"))
    logits = model(IDS)
    same(merge_adapter(model)(IDS), logits)
    assert torch.equal(merge_adapter(model)(IDS), model(IDS))  # twice is once
    for name, layer in adapted(model).items():
        assert not torch.equal(layer.linear.weight, before[f"{name}.weight"])
        assert torch.equal(layer.weight, before[f"{name}.weight"])
    assert torch.equal(unmerge_adapter(model)(IDS), logits)
    for name, layer in adapted(model).items():
        assert torch.equal(layer.linear.weight, before[f"{name}.weight"])


def test_a_merged_model_without_its_wrappers_is_a_plain_one(kind, tmp_path):
    model = stirred(add_adapter(language_model(kind), "*"))
    logits, written = model(IDS), generate(model, IDS, 8, temperature=0)
    plain = unwrap(merge_adapter(model))
    assert not adapted(plain) and list(plain.state_dict()) == list(
        language_model(kind).state_dict()
    )
    assert all(p.requires_grad for p in plain.parameters())
    same(plain(IDS), logits)
    assert torch.equal(generate(plain, IDS, 8, temperature=0), written)
    assert count_bytes(quantized(plain)) < count_bytes(plain)
    export(plain, None, tmp_path)
    same(load(tmp_path)[0](IDS), logits)
    assert torch.equal(
        unwrap(stirred(add_adapter(language_model(kind), "*")))(IDS), language_model(kind)(IDS)
    )


def test_several_adapters_share_a_base(kind):
    model, base = language_model(kind), language_model(kind)(IDS)
    stirred(add_adapter(model, "W_q", name="a"), "a")
    stirred(add_adapter(model, ["W_q", "ff.up"], rank=2, name="b"), "b", seed=2)
    assert adapter_names(model) == ["a", "b"]
    outputs = {}
    for name in ("a", "b", None):
        use_adapter(model, name)
        outputs[name] = model(IDS)
        learning = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all(f"adapters.{name}." in n for n in learning) and bool(learning) == bool(name)
    assert torch.equal(outputs[None], base)
    assert (outputs["a"] - outputs["b"]).abs().max() > 0.1
    alone = stirred(add_adapter(language_model(kind), "W_q", name="a"), "a")
    assert torch.equal(alone(IDS), outputs["a"])
    use_adapter(model, "a")
    merge_adapter(model)
    use_adapter(model, "b")  # takes a out first
    assert torch.equal(model(IDS), outputs["b"])


def test_training_one_leaves_the_other(kind):
    model = add_adapter(language_model(kind), "W_q", name="a")
    train(model, data, LEARN)
    after_a = model.eval()(IDS)
    add_adapter(model, "W_q", name="b")
    train(model, data, LEARN)
    use_adapter(model, "a")
    assert torch.equal(model.eval()(IDS), after_a)


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture
def stored(kind, tmp_path):
    model = stirred(add_adapter(language_model(kind), ["W_q", "ff.down"], rank=2, alpha=7))
    save_adapter(model, tmp_path / "a.safetensors")
    return model, tmp_path / "a.safetensors"


def test_a_stored_adapter_comes_back_and_holds_no_weight(kind, stored):
    model, path = stored
    again = load_adapter(language_model(kind), path, "again")
    assert torch.equal(again(IDS), model(IDS)) and adapter_names(again) == ["again"]
    assert all(key.endswith((".A", ".B")) for key in load_file(path))
    bytes_of_it = 4 * count_learning(model)
    assert bytes_of_it < path.stat().st_size < bytes_of_it + 4000
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    merge_adapter(model)  # a merged one knows its base
    save_adapter(model, path)
    assert torch.equal(load_adapter(language_model(kind), path)(IDS), unmerge_adapter(model)(IDS))


def test_a_wrong_base_or_shape_is_named(kind, stored):
    _, path = stored
    with pytest.raises(ValueError, match="beside other weights"):
        load_adapter(language_model(kind, seed=4), path)
    nudged = language_model(kind)
    with torch.no_grad():
        nudged.blocks[1].attention.W_q.weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match="beside other weights"):
        load_adapter(nudged, path)
    wide = copy.copy(CONFIGS[kind])
    wide.d_model = 64
    with pytest.raises(ValueError, match=r"A of shape \(32, 2\), which in this model is \(64, 2\)"):
        load_adapter(MODELS[kind](wide), path)
    short = copy.copy(CONFIGS[kind])
    short.n_layers = 2
    with pytest.raises(ValueError, match="a layer blocks.2.attention.W_q: this one has none"):
        load_adapter(MODELS[kind](short), path)
    with pytest.raises(ValueError, match="cannot be called 'default'"):
        load_adapter(load_adapter(language_model(kind), path), path)


def test_a_file_that_is_damaged_or_something_else_is_named(kind, stored, tmp_path):
    model, path = stored
    with pytest.raises(ValueError, match="no adapter 'pirate', only: default"):
        save_adapter(model, path, "pirate")
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_adapter(language_model(kind), path)
    path.write_bytes(content)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    tensors = load_file(path)
    save_file({k: t for k, t in tensors.items() if k != "blocks.0.ff.down.B"}, path, said)
    with pytest.raises(ValueError, match="blocks.0.ff.down.B is missing"):
        load_adapter(language_model(kind), path)
    save_file(tensors | {"stray": torch.zeros(2)}, path, said)
    with pytest.raises(ValueError, match="stray of shape .*has no place"):
        load_adapter(language_model(kind), path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="holds no adapter"):
        load_adapter(language_model(kind), path)


def test_a_write_that_fails_leaves_the_old_file(kind, stored, monkeypatch):
    model, path = stored
    before = path.read_bytes()
    monkeypatch.setattr("support.data.os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(stirred(model, seed=9), path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


# ---- what it costs ------------------------------------------------------------------------------


def test_the_bytes_are_those_of_the_tensors(kind):
    model = language_model(kind)
    batch = (IDS[:, :-1], IDS[:, 1:])
    full = step_bytes(model, batch)
    n = count_bytes(model)
    tensors = len(list(model.parameters()))
    assert full["weights"] == full["gradients"] == n
    assert full["AdamW"] == 2 * n + 4 * tensors  # and a count of steps for each tensor
    small = step_bytes(add_adapter(model, "W_q", rank=2), batch)
    assert small["gradients"] == 4 * count_learning(model)
    assert small["AdamW"] == 8 * count_learning(model) + 4 * 6
    assert 0 < small["activations"] < full["activations"]
    assert all(p.grad is None for p in model.parameters())


def test_the_activations_of_a_small_net_are_counted_by_hand():
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    x = torch.randn(4, 5)
    with kept_for_backward(net) as kept:
        net(x).sum()
    assert sum(kept.values()) == 4 * (4 * 5 + 4 * 7)  # the input, and what ReLU gave
    net[0].requires_grad_(False)
    with kept_for_backward(net) as kept:
        net(x).sum()
    assert sum(kept.values()) == 4 * (4 * 7)


def test_the_operations_are_those_of_the_formula():
    net = nn.Linear(5, 7, bias=False)
    batch = (torch.randn(4, 5),)
    loss = lambda model, x: (model(x).sum(), 4)  # noqa: E731
    assert step_flops(net, batch, loss) == {"forward": 2 * 4 * 35, "backward": 2 * 4 * 35}
    two = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 5, bias=False))
    assert step_flops(two, batch, loss) == {"forward": 4 * 4 * 35, "backward": 6 * 4 * 35}
    two[0].requires_grad_(False)
    assert step_flops(two, batch, loss)["backward"] == 2 * 4 * 35


def test_measuring_changes_no_weight():
    model = language_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    seconds = step_seconds(model, (IDS[:, :-1], IDS[:, 1:]), repeats=2)
    assert set(seconds) == {"forward", "backward", "AdamW"} and min(seconds.values()) > 0
    step_bytes(model, (IDS[:, :-1], IDS[:, 1:]))
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    optimizer = make_optimizer(model, LEARN)
    assert state_bytes(optimizer) == 0


def test_a_layer_of_its_own_can_be_wrapped():
    linear = nn.Linear(4, 3)
    layer = LoRALinear(linear)
    x = torch.randn(2, 4)
    assert torch.equal(layer(x), linear(x)) and layer.weight is linear.weight
