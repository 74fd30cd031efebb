"""Shards on disk behave like one array; windows of them come once an epoch; recipes are read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from support.recipe import from_recipe
from support.shards import Shards, Windows, write_shards
from support.tokenizer import BPETokenizer

ROOT = Path(__file__).resolve().parents[1]


class Bytes:
    """A tokenizer: the bytes are the ids."""

    vocab_size = 256

    def encode(self, text):
        return list(text.encode())


class Wide(Bytes):
    """The same, with ids beyond 16 bits."""

    vocab_size = 2**16 + 256

    def encode(self, text):
        return [2**16 + byte for byte in text.encode()]


TEXTS = ["Once upon a time", "", "there was a fox — é", "x", "y" * 70]
IDS = list("".join(TEXTS).encode())


@pytest.fixture
def shards(tmp_path):
    write_shards(iter(TEXTS), Bytes(), tmp_path / "s", shard_tokens=10)
    return Shards(tmp_path / "s")


def test_shards_are_one_array(shards):
    assert len(shards) == len(IDS) == shards.n_bytes and len(shards.shards) == 11
    assert {len(shard) for shard in shards.shards[:-1]} == {10}
    for a in range(0, len(IDS) + 3, 3):
        for b in (a, a + 1, a + 10, a + 25, None, -1):
            assert shards[a:b].tolist() == IDS[a:b]
    assert [shards[i] for i in range(len(IDS))] == IDS and shards[-1] == IDS[-1]
    assert shards[3:50].dtype == np.uint16
    with pytest.raises(IndexError):
        shards[len(IDS)]
    with pytest.raises(ValueError, match="step=2"):
        shards[::2]


def test_texts_end_with_a_token_of_their_own_and_a_shard_may_end_within_one(tmp_path):
    tokenizer = BPETokenizer.train("the cat and the hat " * 9, 260, ["<|endoftext|>"])
    texts, end = ["the cat", "the hat and the cat"], tokenizer.special_tokens["<|endoftext|>"]
    write_shards(texts, tokenizer, tmp_path / "s", 5, end)
    want = [i for text in texts for i in [*tokenizer.encode(text), end]]
    found = Shards(tmp_path / "s")
    assert found[:].tolist() == want and found.vocab_size == 260
    assert found.n_bytes == len("".join(texts))


def test_a_vocabulary_beyond_16_bits_takes_32(tmp_path):
    write_shards(TEXTS, Wide(), tmp_path / "s", 32)
    assert Shards(tmp_path / "s")[:].tolist() == [2**16 + i for i in IDS]
    assert Shards(tmp_path / "s")[:5].dtype == np.uint32


def test_what_is_cut_short_leaves_nothing(tmp_path):
    def texts():
        yield "a" * 25
        raise RuntimeError("the power is out")

    with pytest.raises(RuntimeError):
        write_shards(texts(), Bytes(), tmp_path / "s", 10)
    assert not list(tmp_path.iterdir())


def test_shard_errors_name_the_file(tmp_path, shards):
    with pytest.raises(ValueError, match="s is there already"):
        write_shards(TEXTS, Bytes(), tmp_path / "s")
    with pytest.raises(ValueError, match="shard_tokens=0"):
        write_shards(TEXTS, Bytes(), tmp_path / "t", 0)
    with pytest.raises(ValueError, match="nothing to write"):
        write_shards(["", ""], Bytes(), tmp_path / "t")
    path = tmp_path / "s" / "000003.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(ValueError, match="000003.npy should have 10 ids"):
        Shards(tmp_path / "s")
    np.save(path, np.zeros(9, np.uint16))
    with pytest.raises(ValueError, match="000003.npy should have 10 ids: it has 9"):
        Shards(tmp_path / "s")
    with pytest.raises(ValueError, match="nowhere has no whole index.json"):
        Shards(tmp_path / "nowhere")


MEASURE = """
import resource, sys, torch
from support.shards import Shards, Windows, write_shards
class Bytes:
    vocab_size = 256
    def encode(self, text):
        return list(text.encode())
texts = ("tell me a story " * 4096 for _ in range(int(sys.argv[2])))
write_shards(texts, Bytes(), sys.argv[1], 2**17)
windows = Windows(Shards(sys.argv[1]), 64, 8)
for step in range(len(windows) // 8 // 10):
    windows(step)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no resource module")
def test_memory_does_not_grow_with_the_size(tmp_path):
    peaks = []
    for n in (16, 512):  # 1 MB and 32 MB of text, 2 MB and 64 MB of ids
        command = [sys.executable, "-c", MEASURE, str(tmp_path / str(n)), str(n)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 16, peaks


# ---- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_each_window_comes_once_an_epoch_in_another_order(kind):
    windows = Windows(kind(list(range(101))), 10, 3)
    assert len(windows) == 10
    rows = [row for step in range(10) for row in zip(*windows(step), strict=True)]  # 3 epochs
    for inputs, targets in rows:
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == list(range(inputs[0], inputs[0] + 10))
        assert torch.equal(targets, inputs + 1)
    starts = [int(inputs[0]) for inputs, _ in rows]
    epochs = [starts[:10], starts[10:20], starts[20:]]
    assert all(sorted(epoch) == list(range(0, 100, 10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_a_batch_depends_on_step_and_seed_alone():
    ids = list(range(1001))
    one, other = Windows(ids, 10, 4, seed=5), Windows(ids, 10, 4, seed=5)
    late = one(60)
    for step in (3, 80, 60):
        again = other(step)
    assert torch.equal(late[0], again[0])
    assert not torch.equal(late[0], Windows(ids, 10, 4, seed=6)(60)[0])


def test_a_window_across_a_border_of_shards_is_right(shards):
    ours, plain = Windows(shards, 7, 4), Windows(IDS, 7, 4)
    for step in range(8):
        for a, b in zip(ours(step), plain(step), strict=True):
            assert torch.equal(a, b)


def test_windows_read_only_the_rows_that_are_asked_for(tmp_path):
    class Watched:
        def __len__(self):
            return 10_001

        def __getitem__(self, where):
            asked.append(where)
            return memory[where]

    np.arange(10_001, dtype=np.uint32).tofile(tmp_path / "ids")
    memory, asked = np.memmap(tmp_path / "ids", np.uint32), []
    Windows(Watched(), 10, 3)(100)
    assert len(asked) == 3 and all(part.stop - part.start == 11 for part in asked)


def test_window_errors_name_the_values():
    with pytest.raises(ValueError, match="10 tokens are too few .* at least 11"):
        Windows(range(10), 10, 1)
    with pytest.raises(ValueError, match="not 0 and 3"):
        Windows(range(10), 0, 3)


# ---- recipes ------------------------------------------------------------------------------------

RECIPE = """
[model]
vocab_size = 256
context_length = 8
d_model = 16
n_heads = 2
n_layers = 1

[train]
steps = 6
batch_size = 4
lr = 0.01
eval_every = 3

[data]
train = "s"
val = "s"
val_batches = 2
"""


@pytest.fixture
def recipe(tmp_path, shards):
    def write(text=RECIPE):
        (tmp_path / "r.toml").write_text(text)
        return tmp_path / "r.toml"

    return write


def test_a_recipe_gives_what_train_takes(recipe):
    parts = from_recipe(recipe(), steps=9)
    assert parts["model"].config.d_model == 16
    assert (parts["config"].steps, parts["config"].lr) == (9, 0.01)
    assert parts["data"](0)[0].shape == (4, 8) and len(parts["evaluations"]) == 2
    assert parts["bytes_per_token"] == 1
    weights = parts["model"].head.weight
    assert torch.equal(weights, from_recipe(recipe())["model"].head.weight)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr =", "learning_rate =", r"\[train\] has no key 'learning_rate'"),
        ("d_model", "width", r"\[model\] has no key 'width'"),
        ("val_batches", "batches", r"\[data\] has no key 'batches'"),
        ("steps = 6", "", r"\[train\] needs the key 'steps'"),
        ("[data]", "[text]", r"wrong: \[data\]"),
        ("= 256", "= 255", "vocab_size=255 is too small: the shards need 256"),
        ('val = "s"', 'val = "t"', "t has no whole index.json"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(recipe, old, new, message):
    with pytest.raises(ValueError, match=message):
        from_recipe(recipe(RECIPE.replace(old, new)))


def test_the_command_trains_and_goes_on_by_itself(recipe, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COURSE_QUIET": "1"}

    def command(*options):
        line = [sys.executable, "-m", "support.train", str(recipe()), *options]
        return subprocess.run(line, env=environment, capture_output=True, text=True)

    done = command("--out", str(tmp_path / "out"))
    assert done.returncode == 0 and "bits_per_byte" in done.stdout, done.stderr
    log = (tmp_path / "out" / "log.csv").read_bytes()
    assert log.count(b"\n") == 7
    state = json.loads((tmp_path / "out" / "step-00000006" / "state.json").read_bytes())
    assert state["config"]["steps"] == 6
    assert command("--out", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out" / "log.csv").read_bytes() == log
    other = command("--out", str(tmp_path / "out"), "--steps", "7")
    assert other.returncode == 1 and other.stderr.count("\n") == 1
    assert "config's steps=6, but here it is 7" in other.stderr


def test_windows_can_begin_where_a_text_does():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 20, size=3 * 2**20)  # longer than what is searched at once
    windows = Windows(ids, 12, 5, end_id=7)
    wanted = [0] + [i + 1 for i in np.flatnonzero(ids == 7).tolist() if i + 13 < len(ids)]
    assert list(windows.starts) == wanted
    inputs, targets = windows(3)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    starts = {tuple(ids[i : i + 12].tolist()) for i in wanted}
    assert all(tuple(row.tolist()) in starts for row in inputs)
