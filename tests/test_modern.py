"""The models between GPT-2 and a llama, and the stored comparison of them."""

import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
import torch

from support.gpt import GPTConfig, GPTModel, count_parameters
from support.llama import LlamaConfig, LlamaModel
from support.modern import CHANGES, MixedModel

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import modern

SMALL = LlamaConfig(61, 16, 24, 6, 2, n_layers=2, d_ff=64, rope_base=100.0)


def shaken(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def test_without_changes_it_is_the_gpt():
    gpt = shaken(GPTModel(GPTConfig(61, 16, 24, 6, 2, tie_weights=False)))
    mixed, ids = MixedModel(SMALL, ()), torch.randint(61, (2, 9))
    mixed.load_state_dict({k.removeprefix("embed."): v for k, v in gpt.state_dict().items()})
    torch.testing.assert_close(mixed(ids), gpt(ids))


def test_the_tied_head_alone_gives_gpt2():
    gpt = shaken(GPTModel(GPTConfig(61, 16, 24, 6, 2)))
    mixed, ids = MixedModel(SMALL, ("tied head",)), torch.randint(61, (2, 9))
    mixed.load_state_dict({k.removeprefix("embed."): v for k, v in gpt.state_dict().items()})
    assert mixed.head.weight is mixed.tok_emb.weight
    torch.testing.assert_close(mixed(ids), gpt(ids))


def test_with_all_changes_it_is_the_llama():
    llama, ids = shaken(LlamaModel(SMALL)), torch.randint(61, (2, 9))
    mixed = MixedModel(SMALL, CHANGES)
    mixed.load_state_dict(llama.state_dict())
    torch.testing.assert_close(mixed(ids), llama(ids))


def test_each_pair_of_changes_is_made_and_no_other():
    for pair in combinations(CHANGES, 2):
        model = MixedModel(SMALL, pair)
        block = model.blocks[0]
        made = {
            "RMSNorm": not hasattr(block.ln1, "bias"),
            "RoPE": model.pos_emb is None,
            "SwiGLU": hasattr(block.ff, "gate"),
            "grouped queries": len(block.attention.W_k.weight) == 8,
            "no biases": block.ff.up.bias is None and block.attention.W_q.bias is None,
            "tied head": model.head.weight is model.tok_emb.weight,
        }
        assert {change for change, is_made in made.items() if is_made} == set(pair)
        model(torch.randint(61, (2, 9))).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_rope_grouped_queries_do_not_turn():
    """Queries that share their keys, with positions that are only added, see the same anywhere."""
    model = shaken(MixedModel(replace(SMALL, n_layers=1), ("grouped queries",)))
    torch.nn.init.zeros_(model.pos_emb.weight)
    ids = torch.tensor([[5, 6, 7], [6, 5, 7]])  # the last token sees a set
    torch.testing.assert_close(*model(ids)[:, -1])


def test_an_unknown_change_is_refused():
    with pytest.raises(ValueError, match="There is no change 'ReLU': choose RMSNorm"):
        MixedModel(SMALL, ("ReLU",))


def test_swiglu_keeps_the_parameters():
    wide, gated = (
        count_parameters(MixedModel(modern.SHAPE, c).blocks[0].ff) for c in ((), CHANGES)
    )
    assert wide - gated == 5 * modern.SHAPE.d_model  # the biases


# ---- what is stored -----------------------------------------------------------------------------

RUNS = pd.read_csv(modern.PATH)
IDS = list(range(2000)) * 2


def test_every_planned_run_is_stored_once():
    keys = ["part", "changes", "lr", "seed"]
    stored = RUNS[keys].to_dict("records")
    assert sorted(map(str, stored)) == sorted(map(str, modern.planned()))


@pytest.mark.parametrize("changes", RUNS.changes.unique())
def test_what_can_be_counted_is_counted_again(changes):
    """Parameters and operations from the model itself, and steps from the budget."""
    rows = RUNS[RUNS.changes == changes]
    model = modern.build(modern.changes_of({"changes": changes}), 0)
    assert set(rows.parameters) == {count_parameters(model)}
    per_step = modern.flops(model, IDS)
    assert set(rows.flops) == {per_step}
    assert set(rows.steps) == {round(modern.BUDGET / per_step)}
    assert abs(rows.steps.iloc[0] * per_step / modern.BUDGET - 1) < 0.005  # equal compute


def test_all_runs_are_finite_and_better_than_guessing():
    assert RUNS.val_loss.between(1, 7).all() and (RUNS.seconds > 5).all()
    turned = RUNS.changes.str.contains("RoPE")
    assert RUNS.far[turned].notna().all() and RUNS.far[~turned].isna().all()


def test_the_first_steps_of_two_stored_runs_come_out_again():
    ids = modern.tokens("train", modern.N_STORIES)
    seed_one = RUNS[(RUNS.part == "path") & (RUNS.seed == 1)]
    for row in (seed_one.iloc[0], seed_one.iloc[-1]):
        model = modern.build(modern.changes_of(row), 1)
        again = modern.learn(model, ids, row.lr, 1, int(row.steps), until=5)
        assert again["loss 5"] == pytest.approx(row["loss 5"], abs=2e-3)
