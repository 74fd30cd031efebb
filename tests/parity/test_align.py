"""Reward model, PPO and DPO equal trl's, and plain double loops; padding changes nothing."""

import inspect
import math
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.align import (
    dpo_loss,
    ipo_loss,
    pair_logprobs,
    preference_batch,
    preference_loss,
    with_reference,
)
from support.gpt import GPTConfig, GPTModel
from support.instruct import Example, pad_examples
from support.ppo import (
    PPOConfig,
    adapted,
    gae,
    guess_loss,
    only_top,
    penalized,
    policy_loss,
    ppo,
    roll_out,
    token_logprobs,
    value_loss,
    whiten,
)
from support.reward import RewardModel, bradley_terry_loss, last, pair_batch, reward_loss
from support.train import TrainConfig, train

END = 60


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def small_model(seed=0, **changes) -> GPTModel:
    torch.manual_seed(seed)
    model = GPTModel(GPTConfig(61, 24, d_model=32, n_heads=4, n_layers=2, **changes)).eval()
    with torch.no_grad():  # far from its first state, where all logits are nearly equal
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_row(rng, prompt=4, answer=5) -> Example:
    ids = rng.integers(0, END, prompt + answer).tolist()
    return Example(ids, [False] * prompt + [True] * answer)


def random_pairs(n=3, seed=0) -> list[tuple[Example, Example]]:
    """Return pairs whose prompts and answers have unequal lengths."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 7, (n, 3))
    return [(random_row(rng, p, a), random_row(rng, p, b)) for p, a, b in sizes.tolist()]


# ---- trl ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words():
    """Return a tokenizer of transformers with 59 words, padding and an end."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {f"w{i}": i for i in range(59)} | {"[PAD]": 59, "[EOS]": END}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", eos_token="[EOS]"
    )


def settings_of(kind, folder, **options):
    return kind(output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, **options)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kinds", [{"sigmoid": 1.0}, {"sigmoid": 1.0, "sft": 0.7}, {"ipo": 1.0}])
def test_dpo_and_ipo_equal_trls_trainer(kinds, gpt_pair, words, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    (theirs, ours), (their_reference, our_reference) = gpt_pair(seed=1), gpt_pair(seed=2)
    beta = 0.3
    trainer = trl.DPOTrainer(
        theirs,
        their_reference,
        args=settings_of(
            trl.DPOConfig,
            tmp_path,
            beta=beta,
            loss_type=list(kinds),
            loss_weights=list(kinds.values()),
            max_length=16,
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5"}] * 2
        ),
        processing_class=words,
    )
    pairs = random_pairs(4)
    ids, mask = pair_batch(pairs)
    in_their_order = torch.cat([ids[:, 0], ids[:, 1]]), torch.cat([mask[:, 0], mask[:, 1]])
    lengths = torch.tensor([len(row.ids) for i in (0, 1) for row in [p[i] for p in pairs]])
    inputs = {
        "input_ids": in_their_order[0],
        "attention_mask": (torch.arange(ids.shape[2]) < lengths[:, None]).long(),
        "completion_mask": in_their_order[1].long(),
    }
    want = trainer.compute_loss(theirs, inputs)
    reference = preference_batch(with_reference(our_reference, pairs))[2]
    if "sigmoid" in kinds:
        total, n = preference_loss(beta, kinds.get("sft", 0.0))(ours, ids, mask, reference)
        assert n == 4
        same(total / n, want)
        (total / n).backward()
        want.backward()
        same(ours.head.weight.grad, theirs.lm_head.weight.grad)
    else:
        logprobs = pair_logprobs(ours, ids, mask)
        same(ipo_loss(logprobs, reference, mask.sum(dim=2), beta).mean(), want)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_reward_model_and_its_loss_equal_trls_trainer(gpt_pair, words, tmp_path):
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    language_model, ours = gpt_pair(seed=3)
    language_model.config.num_labels, language_model.config.pad_token_id = 1, 59
    theirs = transformers.GPT2ForSequenceClassification(language_model.config).eval()
    theirs.transformer.load_state_dict(language_model.transformer.state_dict())
    mine = RewardModel(ours).eval()
    mine.body.head.weight.data.copy_(theirs.score.weight)
    trainer = trl.RewardTrainer(
        theirs,
        args=settings_of(trl.RewardConfig, tmp_path, max_length=16),
        train_dataset=datasets.Dataset.from_list([{"chosen": "w1 w2", "rejected": "w3"}] * 2),
        processing_class=words,
    )
    pairs = [(a, b) for a, b in random_pairs(5, seed=4)]
    ids, mask = pair_batch(pairs)
    lengths = torch.tensor([[len(row.ids) for row in pair] for pair in pairs])
    padded = torch.arange(ids.shape[2]) >= lengths[..., None]
    flat = [torch.cat([x[:, 0], x[:, 1]]) for x in (ids.masked_fill(padded, 59), ~padded)]
    want = trainer.compute_loss(
        theirs.eval(), {"input_ids": flat[0], "attention_mask": flat[1].long()}
    )
    total, n = reward_loss(mine, ids, mask)
    same(total / n, want)
    assert want.item() != pytest.approx(math.log(2), abs=0.01)


def trl_lines(first: str, end: str) -> str:
    """Return the lines of trl's PPO from one that begins with `first` up to one with `end`."""
    trainer = pytest.importorskip("trl.experimental.ppo.ppo_trainer").PPOTrainer
    lines = inspect.getsource(trainer.train).splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    stop = next(i for i, line in enumerate(lines[start:], start) if line.strip().startswith(end))
    return textwrap.dedent("\n".join(lines[start:stop]))


def run_trl(first: str, end: str, **names) -> dict:
    """Run those lines on our tensors."""
    module = pytest.importorskip("trl.experimental.ppo.ppo_trainer")
    names = (
        {"torch": torch} | {k: vars(module)[k] for k in ("masked_mean", "masked_whiten")} | names
    )
    exec(trl_lines(first, end), names)
    return names


def ragged_mask(lengths, T) -> torch.Tensor:
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def test_advantages_equal_trls():
    torch.manual_seed(0)
    mask = ragged_mask([7, 4, 1], 7)
    rewards, values = (torch.randn(3, 7) * mask for _ in range(2))
    theirs = run_trl(
        "lastgaelam = 0",
        "empty_cache",
        responses=rewards,
        rewards=rewards,
        values=values,
        padding_mask=~mask,
        args=SimpleNamespace(gamma=0.9, lam=0.8),
    )
    ours = gae(rewards, values, mask, 0.9, 0.8)
    same((ours + values) * mask, theirs["returns"] * mask)
    same(whiten(ours, mask), theirs["advantages"])


def test_the_parts_of_ppos_loss_equal_trls():
    torch.manual_seed(1)
    mask = ragged_mask([6, 3, 5, 1], 6)
    old, values, returns, advantages = (torch.randn(4, 6) for _ in range(4))
    new, predicted = old + 0.5 * torch.randn(4, 6), values + 0.5 * torch.randn(4, 6)
    theirs = run_trl(
        "vpredclipped = torch.clamp(",
        "accelerator.backward",
        vpred=predicted,
        mb_values=values,
        mb_return=returns,
        mb_logprobs=old,
        new_logprobs=new,
        mb_advantage=advantages,
        padding_mask=~mask,
        padding_mask_p1=~mask,
        micro_batch_inds=torch.arange(4),
        args=SimpleNamespace(cliprange=0.2, cliprange_value=0.3, vf_coef=0.1),
    )
    same(policy_loss(new, old, advantages, mask, 0.2), theirs["pg_loss"])
    same(value_loss(predicted, values, returns, mask, 0.3), theirs["vf_loss"])


def test_the_penalty_equals_trls():
    torch.manual_seed(2)
    mask, (logprobs, reference) = ragged_mask([5, 2], 5), torch.randn(2, 2, 5)
    theirs = run_trl(
        "logr = ref_logprobs",
        "rewards = non_score_reward",
        ref_logprobs=reference,
        logprobs=logprobs,
        args=SimpleNamespace(kl_estimator="k1", kl_coef=0.07),
    )
    scores = torch.tensor([2.0, -3.0])
    ours = penalized(scores, logprobs, reference, mask, 0.07)
    at_the_end = torch.zeros(2, 5)
    at_the_end[0, 4], at_the_end[1, 1] = 2.0, -3.0
    same(ours - at_the_end, theirs["non_score_reward"] * mask)


# ---- definitions --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_gae_equals_a_double_loop(B, T, gamma, lam, seed):
    rng = np.random.default_rng(seed)
    start = rng.integers(0, T, B)
    end = rng.integers(start + 1, T + 1)
    rewards, values = rng.normal(size=(2, B, T))
    want = np.zeros((B, T))
    for b in range(B):
        for t in range(start[b], end[b]):
            for later in range(t, end[b]):
                following = values[b, later + 1] if later + 1 < end[b] else 0
                delta = rewards[b, later] + gamma * following - values[b, later]
                want[b, t] += (gamma * lam) ** (later - t) * delta
    mask = (np.arange(T) >= start[:, None]) & (np.arange(T) < end[:, None])
    found = gae(torch.tensor(rewards), torch.tensor(values), torch.tensor(mask), gamma, lam)
    np.testing.assert_allclose(found.numpy(), want, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 8), st.integers(0, 10**6))
def test_whitening_looks_at_real_tokens_only(B, T, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((B, T)) < 0.6
    mask[0, :2] = True
    x = torch.tensor(rng.normal(3, 5, (B, T)))
    white = whiten(x, torch.tensor(mask))
    assert white[torch.tensor(~mask)].eq(0).all()
    real = white[torch.tensor(mask)]
    assert real.mean().abs() < 1e-6 and real.std() == pytest.approx(1, abs=1e-4)
    spoiled = torch.where(torch.tensor(mask), x, 1e6)
    same(whiten(spoiled, torch.tensor(mask)), white)


def test_the_loss_of_a_policy_that_is_its_reference_is_ln_2():
    model, pairs = small_model(), random_pairs(4)
    total, n = preference_loss(0.1)(model, *preference_batch(with_reference(model, pairs)))
    same(total / n, torch.tensor(math.log(2)))
    reward_model = RewardModel(model)  # its head is 0
    total, n = reward_loss(reward_model, *pair_batch(pairs))
    same(total / n, torch.tensor(math.log(2)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=4, max_size=4), st.floats(0.01, 2))
def test_dpo_is_bradley_terry_on_margins(numbers, beta):
    logprobs, reference = torch.tensor(numbers).view(2, 1, 2)
    loss = dpo_loss(logprobs, reference, beta)
    margins = beta * (logprobs - reference)
    same(loss, bradley_terry_loss(margins[:, 0], margins[:, 1]))
    flipped = dpo_loss(logprobs.flip(1), reference.flip(1), beta)
    same((-loss).exp() + (-flipped).exp(), torch.ones(1))  # two probabilities


def test_log_probabilities_are_those_of_the_whole_softmax():
    model, (ids, mask) = small_model(), pair_batch(random_pairs(3))
    ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)
    every = model(ids[:, :-1]).log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    same(token_logprobs(model, ids, mask), every * mask[:, 1:])


def test_padding_and_tokens_after_the_end_change_nothing():
    model, (ids, mask) = small_model(), pair_batch(random_pairs(3, seed=5))
    ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)
    reward_model = RewardModel(model)
    torch.nn.init.normal_(reward_model.body.head.weight)
    junk = torch.randint(END, (len(ids), 3))
    longer = torch.cat([ids, junk], dim=1), torch.cat([mask, torch.zeros(6, 3).bool()], dim=1)
    same(reward_model.score(*longer), reward_model.score(ids, mask))
    same(token_logprobs(model, *longer)[:, :-3], token_logprobs(model, ids, mask))
    for row, (i, m) in enumerate(zip(ids, mask, strict=True)):  # alone, without any padding
        n = int(m.nonzero().max()) + 1
        alone = i[None, :n], m[None, :n]
        same(reward_model.score(*alone)[0], reward_model.score(ids, mask)[row])
        same(token_logprobs(model, *alone).sum(), token_logprobs(model, ids, mask)[row].sum())


def test_the_last_token_is_found_and_must_be_there():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]]).bool()
    assert last(mask).tolist() == [2, 3, 0]
    with pytest.raises(ValueError, match="all False"):
        last(torch.tensor([[True], [False]]))


def test_the_coefficient_follows_the_distance_from_the_reference():
    assert adapted(0.1, 6.0, 6.0, 32, 1000) == 0.1
    assert adapted(0.1, 60.0, 6.0, 32, 1000) == pytest.approx(0.1 * (1 + 0.2 * 0.032))
    assert adapted(0.1, 0.0, 6.0, 32, 1000) == pytest.approx(0.1 * (1 - 0.2 * 0.032))
    assert adapted(0.1, 6.6, 6.0, 1000, 1000) == pytest.approx(0.11)


# ---- learning -----------------------------------------------------------------------------------


class LikesToken7(RewardModel):
    """A judge for tests: an answer is worth the share of its tokens that are 7."""

    def score(self, ids, mask):
        return ((ids == 7) & mask).sum(dim=1) / mask.sum(dim=1)


def prompts(step):
    return [[1, 2, 3][: 1 + i % 3] for i in range(16)]


CONFIG = {"batch_size": 16, "minibatch": 16, "max_new_tokens": 6, "lr": 3e-3}


def models():
    policy = small_model()
    return policy, small_model(), LikesToken7(policy), RewardModel(policy)


def test_rollouts_hold_what_the_models_say_of_the_answers():
    policy, reference, judge, values = models()
    config = PPOConfig(steps=1, unfinished=0.5, **CONFIG)
    state = policy, reference, judge, values, prompts(0), END, config
    rolled = roll_out(*state, torch.Generator().manual_seed(1))
    for i, prompt in enumerate(prompts(0)):
        n = int(rolled.mask[i].sum())
        row = rolled.ids[i][: len(prompt) + n].tolist()
        assert row[: len(prompt)] == prompt and 1 <= n <= 6
        assert rolled.mask[i].nonzero()[:, 0].tolist() == list(range(len(prompt), len(row)))
        assert rolled.ended[i] == (row[-1] == END)
        assert END not in row[:-1] and rolled.ended[i] or n == 6
        worth = row[len(prompt) :].count(7) / n - (0.0 if rolled.ended[i] else 0.5)
        assert rolled.scores[i] == pytest.approx(worth)
        with torch.no_grad():
            logprobs = policy(torch.tensor([row]))[0].log_softmax(dim=-1)
        alone = [logprobs[t - 1, row[t]].item() for t in range(len(prompt), len(row))]
        same(rolled.logprobs[i][rolled.mask[i, 1:]], torch.tensor(alone))
    same(rolled.logprobs, rolled.reference)
    assert rolled.ended.any() and not rolled.ended.all()


def test_the_first_ratio_is_exactly_1():
    log = ppo(*models(), prompts, END, PPOConfig(steps=1, epochs=1, **CONFIG))
    assert log.first_ratio_error.item() == 0 and log.clipped.item() == 0
    policy, *others = models()
    policy = small_model(dropout=0.5).train()  # dropout is off meanwhile
    log = ppo(policy, *others, prompts, END, PPOConfig(steps=2, **CONFIG))
    assert log.first_ratio_error.max() < 1e-5 and policy.training


def test_ppo_learns_what_is_liked_and_the_penalty_holds_it_back():
    logs = {
        kl_coef: ppo(*models(), prompts, END, PPOConfig(steps=40, kl_coef=kl_coef, **CONFIG))
        for kl_coef in (0.0, 0.5)
    }
    free, held = (log.tail(5).mean() for log in logs.values())
    assert free.score > logs[0.0].score[0] + 0.4 and free.score > held.score + 0.2
    assert free.kl > held.kl + 1 and held.kl < 2


def test_examples_keep_what_ppo_would_forget():
    row = Example([1, 2, 3, 4, 5, END], [False] * 2 + [True] * 4)
    examples, told = pad_examples([row]), {}
    for coef in (0.0, 1.0):
        policy, *others = models()
        config = PPOConfig(steps=20, sft_coef=coef, **CONFIG)
        log = ppo(policy, *others, prompts, END, config, lambda change: examples)
        told[coef] = token_logprobs(policy, *examples).sum().item()
        assert log.score.tail(5).mean() > log.score[0] + 0.1
    assert told[1.0] > told[0.0] + 1


def test_a_value_model_learns_to_guess_the_score_of_every_token():
    rows = [random_row(np.random.default_rng(i), prompt=2 + i % 3) for i in range(8)]
    values, (ids, mask) = RewardModel(small_model()), pad_examples(rows)
    scores = torch.arange(8) / 4 - 1
    total, n = guess_loss(values, ids, mask, scores)  # its head is zero
    assert n == mask.sum() and total.item() == pytest.approx((scores**2).sum().item() * 5)
    train(values, lambda _: (ids, mask, scores), TrainConfig(60, 8, lr=3e-3), loss=guess_loss)
    for i, row in enumerate(rows):  # the token before the answer guesses already
        guesses = values(torch.tensor([row.ids]))[0, -6:-1]
        same(guesses, scores[i].expand(5), tolerance=0.1)


def test_a_frozen_value_body_is_left_alone():
    policy, reference, judge, values = models()
    values.body.requires_grad_(False)
    values.body.head.requires_grad_(True)
    before = {name: p.clone() for name, p in values.named_parameters()}
    ppo(policy, reference, judge, values, prompts, END, PPOConfig(steps=2, **CONFIG))
    changed = {n for n, p in values.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"body.head.weight", "body.head.bias"}
    for mine, first in zip(reference.parameters(), small_model().parameters(), strict=True):
        assert torch.equal(mine, first)


def test_only_the_top_learns():
    policy, *others = models()
    before = {name: p.clone() for name, p in policy.named_parameters()}
    ppo(only_top(policy, 1), *others, prompts, END, PPOConfig(steps=2, **CONFIG))
    changed = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.startswith(("blocks.1.", "ln."))}


def test_the_coefficient_adapts_in_the_loop():
    config = PPOConfig(steps=3, target_kl=1e-6, horizon=16, **CONFIG)
    log = ppo(*models(), prompts, END, config)
    assert log.kl_coef[1] == pytest.approx(0.1 * 0.8)  # at first the distance is 0
    assert log.kl_coef[2] == pytest.approx(0.1 * 0.8 * 1.2)


def test_a_reward_model_and_dpo_learn_a_preference_by_train():
    rng = np.random.default_rng(0)

    def pair():
        chosen, rejected = random_row(rng), random_row(rng)
        chosen.ids[6], rejected.ids[6] = 7, 8
        return chosen, rejected

    pairs = [pair() for _ in range(32)]
    reward_model = RewardModel(small_model())
    config = TrainConfig(30, 32, lr=3e-3)
    log = train(reward_model, lambda _: pair_batch(pairs), config, loss=reward_loss)
    assert log.loss[0] == pytest.approx(math.log(2)) and log.loss.iloc[-1] < 0.1
    policy = small_model()
    data = preference_batch(with_reference(small_model(), pairs))
    log = train(policy, lambda _: data, config, loss=preference_loss(0.5))
    assert log.loss[0] == pytest.approx(math.log(2), abs=1e-5) and log.loss.iloc[-1] < 0.1
    margins = pair_logprobs(policy, *data[:2]) - data[2]
    assert (margins[:, 0] > margins[:, 1]).all()
