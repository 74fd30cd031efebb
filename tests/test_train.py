"""A run survives: killed, interrupted, damaged, diverged, alone and with others."""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import small_run
from small_run import config, data, small_model

from support import checkpoint
from support import train as training
from support.checkpoint import (
    CheckpointError,
    checkpoints,
    load_weights,
    random_state,
    save_weights,
    set_random_state,
    whole_folder,
)
from support.generate import generate
from support.train import LossError, train

ROOT = Path(__file__).resolve().parents[1]
needs_fork = pytest.mark.skipif(os.name == "nt", reason="Windows has neither fork nor SIGKILL")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("COURSE_QUIET", "1")


def start(folder: Path, **options):
    """Start `small_run.main` in a process of its own, forked from one that has PyTorch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.train"])
    process = context.Process(target=small_run.main, args=(folder,), kwargs=options)
    process.start()
    return process


def run(folder: Path, **options) -> None:
    process = start(folder, **options)
    process.join(60)
    assert process.exitcode == 0


def run_together(folder: Path, n: int = 2, **options) -> None:
    """Run n processes with the environment that torchrun would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    env["WORLD_SIZE"] = str(n)
    ranks = [start(folder, env=env | {"RANK": str(rank)}, **options) for rank in range(n)]
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * n


def log_of(folder: Path) -> list[str]:
    """Return the log as it is written, but for the seconds."""
    return [line.rsplit(",", 1)[0] for line in (folder / "log.csv").read_text().splitlines()]


def assert_same_run(a: Path, b: Path, n_ranks: int = 1) -> None:
    """Every row, weight, average and random number of two runs is the same, bit for bit."""
    assert log_of(a) == log_of(b)
    files = [f"final-{rank}.safetensors" for rank in range(n_ranks)]
    last = checkpoints(a)[-1].name
    assert checkpoints(b)[-1].name == last
    for name in [*files, f"{last}/model.safetensors", f"{last}/optimizer.safetensors"]:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    states = [json.loads((run / last / "state.json").read_bytes()) for run in (a, b)]
    assert states[0]["random"] == states[1]["random"] and len(states[0]["random"]) == n_ranks


# ---- killed, and continued ----------------------------------------------------------------------


@needs_fork
def test_killed_ten_times_at_any_instant_a_run_ends_as_if_never_killed(tmp_path):
    options = {"dropout": 0.2, "steps": 90, "save_every": 3}
    run(tmp_path / "never", **options)
    draw, folder = random.Random(0), tmp_path / "killed"
    log = folder / "log.csv"
    for _ in range(10):
        before = [int(path.name[5:]) for path in checkpoints(folder)][-1:] or [0]
        rows, started = before[0] + draw.randint(1, 6), time.time_ns()
        process = start(folder, **options)
        while not (
            log.exists() and log.stat().st_mtime_ns > started and len(log_of(folder)) > rows
        ):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run(folder, **options)
    assert_same_run(tmp_path / "never", folder)
    steps = pd.read_csv(log).step.tolist()
    assert steps == list(range(1, 91))
    assert sorted(path.name for path in folder.iterdir()) == [
        "final-0.safetensors",
        "log.csv",
        "step-00000087",
        "step-00000090",
    ]


@needs_fork
@pytest.mark.parametrize(
    ("function", "call", "left"),
    [  # what the process is about to call when it dies → the newest checkpoint that is left
        ("save_file", 3, 3),
        ("save_file", 4, 3),
        ("sha256", 4, 3),
        ("flush", 8, 3),
        ("flush", 12, 6),
        ("discard", 1, 9),
    ],
)
def test_killed_at_each_point_of_saving_a_run_ends_as_if_never_killed(
    tmp_path, function, call, left
):
    options = {"dropout": 0.2, "steps": 12, "save_every": 3}
    run(tmp_path / "never", **options)
    process = start(tmp_path / "killed", die_in=(function, call), **options)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert checkpoints(tmp_path / "killed")[-1].name == f"step-{left:08d}"
    run(tmp_path / "killed", **options)
    assert_same_run(tmp_path / "never", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".unfinished-*"))


def test_a_checkpoint_gets_its_name_only_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    seen = []

    def watch(function, name):
        def call(path, *rest):
            seen.append((name, Path(path).name))
            return function(path, *rest)

        return call

    monkeypatch.setattr(checkpoint, "flush", watch(checkpoint.flush, "flush"))
    monkeypatch.setattr(Path, "rename", watch(Path.rename, "rename"))
    with whole_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("1")
        (folder / "b").write_text("2")
        assert not (tmp_path / "x").exists()
    assert sorted(seen[:2]) == [("flush", "a"), ("flush", "b")]
    assert seen[2:] == [
        ("flush", ".unfinished-x"),
        ("rename", ".unfinished-x"),
        ("flush", tmp_path.name),
    ]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("1")
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_rows_after_the_checkpoint_and_a_torn_row_are_cut_off(tmp_path):
    settings = config(save_every=5)
    want = train(small_model(), data, settings, tmp_path / "never")
    with pytest.raises(ZeroDivisionError):
        train(small_model(), data, settings, tmp_path / "cut", on_step=fail_at(8))
    with (tmp_path / "cut" / "log.csv").open("a") as log:
        log.write("9,2")
    log = train(small_model(), data, settings, tmp_path / "cut")
    assert log.drop(columns="seconds").equals(want.drop(columns="seconds"))
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "never")
    assert log.seconds.is_monotonic_increasing


def fail_at(step):
    def on_step(row):
        if row["step"] == step:
            raise ZeroDivisionError

    return on_step


def test_a_finished_run_is_read_and_not_run(tmp_path):
    want = train(small_model(), data, config(), tmp_path)

    def no_data(step):
        raise AssertionError(step)

    model = small_model()
    log = train(model, no_data, config(), tmp_path)
    assert log.equals(want)
    saved = load_file(tmp_path / "step-00000020" / "model.safetensors")
    assert torch.equal(model.ln.weight, saved["ln.weight"])


def test_without_resume_a_run_begins_anew(tmp_path):
    train(small_model(), data, config(save_every=4), tmp_path)
    log = train(small_model(), data, config(steps=10, save_every=4), tmp_path, resume=False)
    assert log.step.tolist() == list(range(1, 11)) and len(log_of(tmp_path)) == 11
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000008", "step-00000010"]


def test_random_numbers_go_on_where_they_were():
    def numbers():
        return torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)

    numbers()
    random.gauss(0, 1)  # Python and NumPy keep the second of two normal numbers
    np.random.randn()
    state = json.loads(json.dumps(random_state()))
    want = numbers()
    assert numbers() != want
    set_random_state(state)
    assert numbers() == want


# ---- damaged, or of another run -----------------------------------------------------------------


def cut_off(file: Path):
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_off, flip, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    settings = config(steps=9, save_every=3)
    want = train(small_model(), data, settings, tmp_path)
    damage(tmp_path / "step-00000009" / name)
    with pytest.warns(UserWarning, match=f"step-00000009.{name} is missing, cut off or changed"):
        log = train(small_model(), data, settings, tmp_path)
    assert log.drop(columns="seconds").equals(want.drop(columns="seconds"))
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["step-00000006", "step-00000009"]
    train(small_model(), data, settings, tmp_path)  # whole again: no warning (an error in pytest)


def test_damaged_checkpoints_only_are_an_error_that_says_what_to_do(tmp_path):
    train(small_model(), data, config(save_every=10), tmp_path)
    for path in checkpoints(tmp_path):
        cut_off(path / "model.safetensors")
    with pytest.raises(CheckpointError, match="step-00000010.model.*no other is left.*delete"):
        train(small_model(), data, config(save_every=10), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("lr", 0.5), ("steps", 21), ("betas", (0.8, 0.95)), ("micro_batch", 2)]
)
def test_a_checkpoint_of_another_configuration_is_refused_by_field(tmp_path, field, value):
    train(small_model(), data, config(), tmp_path)
    model = small_model()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(CheckpointError, match=rf"step-00000020 has .*{field}=.*, but here it is"):
        train(model, data, dataclasses.replace(config(), **{field: value}), tmp_path)
    assert all(map(torch.equal, model.parameters(), before))


def test_a_checkpoint_of_another_model_is_refused_by_field_or_weight(tmp_path):
    train(small_model(), data, config(), tmp_path)
    with pytest.raises(CheckpointError, match="dropout=0.0, but here it is 0.1"):
        train(small_model(dropout=0.1), data, config(), tmp_path)
    model = small_model()
    model.ln = nn.LayerNorm(17)
    with pytest.raises(CheckpointError, match=r"ln.weight=\(16,\), but here it is \(17,\)"):
        train(model, data, config(), tmp_path)
    model.ln = nn.Identity()
    with pytest.raises(CheckpointError, match=r"ln.bias=\(16,\), but here it is None"):
        train(model, data, config(), tmp_path)


def test_a_tied_weight_is_written_once_and_stays_tied(tmp_path):
    model, other = small_model(), small_model()
    nn.init.normal_(model.tok_emb.weight)
    save_weights(model, tmp_path / "w")
    names = set(load_file(tmp_path / "w"))
    assert "embed.tok_emb.weight" in names and "head.weight" not in names
    load_weights(other, tmp_path / "w")
    assert other.head.weight is other.tok_emb.weight
    assert torch.equal(other.head.weight, model.head.weight)


# ---- interrupted, or diverged -------------------------------------------------------------------


@pytest.mark.parametrize("real", [True, False])
def test_ctrl_c_ends_with_a_checkpoint_and_the_log_so_far(tmp_path, capsys, real):
    def on_step(row):
        if row["step"] == 6:
            if not real:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    want = train(small_model(0.2), data, config(), tmp_path / "never")
    log = train(small_model(0.2), data, config(), tmp_path / "stopped", on_step=on_step)
    assert log.step.tolist() == [1, 2, 3, 4, 5, 6]
    said = capsys.readouterr().out
    assert "after step 6: " in said and str(tmp_path / "stopped") in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    log = train(small_model(0.2), data, config(), tmp_path / "stopped")
    assert log.drop(columns="seconds").equals(want.drop(columns="seconds"))


def test_ctrl_c_within_a_step_waits_for_its_end_and_a_second_one_does_not():
    def pressed(times):
        def loss(model, *batch):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            return training.token_loss(model, *batch)

        return loss

    assert len(train(small_model(), data, config(), loss=pressed(1))) == 1
    with pytest.raises(KeyboardInterrupt):
        train(small_model(), data, config(), loss=pressed(2))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_in_another_thread_works():
    logs = []
    thread = threading.Thread(
        target=lambda: logs.append(train(small_model(), data, config(eval_every=None)))
    )
    thread.start()
    thread.join()
    assert len(logs[0]) == 20


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_it_hurts(tmp_path, fault):
    def loss(model, inputs, targets):
        total, n = training.token_loss(model, inputs, targets)
        if len(seen) == 7:
            if fault == "loss":
                return total * math.nan, n
            zero = (model.ln.weight * 0).sum()
            return total + (zero.sqrt() if fault == "gradient" else 0), n
        return total, n

    seen = []
    model = small_model()
    with pytest.raises(LossError, match=r"step 7, with lr=0\.000\d+, .*(nan|inf).*lower lr"):
        train(model, data, config(save_every=4), tmp_path, on_step=seen.append, loss=loss)
    assert isinstance(LossError(), FloatingPointError)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000004"]
    assert len(train(small_model(), data, config(save_every=4), tmp_path)) == 20


# ---- what is shown and logged -------------------------------------------------------------------


def test_the_log_has_its_columns_and_the_evaluations(tmp_path):
    batches = [data(100), data(101)]
    log = train(small_model(), data, config(lr=0.01), tmp_path, batches, bytes_per_token=2.5)
    assert log.columns.tolist()[:5] == ["step", "tokens", "lr", "loss", "grad_norm"]
    assert log.columns.tolist()[5:8] == ["val_loss", "val_perplexity", "bits_per_byte"]
    assert log.columns.tolist()[8:] == ["seconds"]
    assert log.step[log.val_loss.notna()].tolist() == [7, 14, 20]
    evaluated = log.dropna()
    assert np.allclose(evaluated.val_perplexity, np.exp(evaluated.val_loss))
    assert np.allclose(evaluated.bits_per_byte, evaluated.val_loss / math.log(2) / 2.5)
    counts = [int((data(step)[1] != -100).sum()) for step in range(20)]
    assert log.tokens.tolist() == np.cumsum(counts).tolist()
    assert log.val_loss.iloc[-1] < log.val_loss.iloc[6]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "log.csv"), log)


def test_samples_are_printed_and_change_nothing(capsys):
    def sample(model):
        ids = generate(model, [[1, 2]], max_new_tokens=4)[0]
        return f"<{len(ids)} ids after {torch.rand(()).item():.3f}>"

    without = train(small_model(0.2), data, config())
    log = train(small_model(0.2), data, config(sample_every=8), sample=sample)
    assert capsys.readouterr().out.count("<6 ids after ") == 3
    assert log.drop(columns="seconds").equals(without.drop(columns="seconds"))


def test_a_bar_shows_the_loss_to_a_person_and_nothing_where_nobody_watches(monkeypatch, capfd):
    train(small_model(), data, config())
    assert capfd.readouterr() == ("", "")
    monkeypatch.delenv("COURSE_QUIET")
    train(small_model(), lambda step: time.sleep(0.02) or data(step), config())
    said = capfd.readouterr().err
    assert "training" in said and "loss=3." in said and "/20 [" in said


def test_errors_name_the_values():
    for wrong, message in {
        "steps": (0, "steps=0 must be at least 1"),
        "batch_size": (0, "batch_size=0"),
        "micro_batch": (0, "micro_batch=0"),
        "warmup": (21, "warmup=21 must be from 0 to steps=20"),
        "decay": ("cosinus", 'decay=\'cosinus\' must be "cosine" or "trapezoid"'),
    }.items():
        with pytest.raises(ValueError, match=message[1]):
            config(**{wrong: message[0]})
    with pytest.raises(ValueError, match="6 rows, but batch_size=4"):
        train(small_model(), data, config(batch_size=4))
    nothing = torch.full((6, 8), -100)
    with pytest.raises(ValueError, match="Step 0 has nothing to learn from"):
        train(small_model(), lambda step: (data(step)[0], nothing), config())
    with pytest.raises(ValueError, match="nothing to evaluate"):
        training.evaluate(small_model(), [(data(0)[0], nothing)])


def test_mixed_precision_is_for_cuda_only(monkeypatch):
    assert not torch.is_autocast_enabled("cpu")
    for kind in ("cpu", "mps"):
        with training.mixed_precision(torch.device(kind)):
            assert not torch.is_autocast_enabled("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    context = training.mixed_precision(torch.device("cuda"))
    assert (context.device, context.fast_dtype) == ("cuda", torch.bfloat16)


# ---- several processes --------------------------------------------------------------------------


def test_torchrun_gives_the_curve_of_one_process(tmp_path):
    options = {"lr": 0.01, "micro_batch": 2, "clip": 0.5, "double": True}
    small_run.main(tmp_path / "one", **options | {"micro_batch": None})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tests/tools/small_run.py"), str(tmp_path / "two"), json.dumps(options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "destroy_process_group" not in done.stderr  # PyTorch would complain about one left open
    one, two = (pd.read_csv(tmp_path / name / "log.csv") for name in ("one", "two"))
    columns = ["step", "tokens", "lr", "loss", "grad_norm", "val_loss", "bits_per_byte"]
    np.testing.assert_allclose(two[columns], one[columns], rtol=1e-9, atol=1e-9)
    assert one.loss[0] - one.loss[19] > 0.3
    ranks = [load_file(tmp_path / "two" / f"final-{rank}.safetensors") for rank in (0, 1)]
    alone = load_file(tmp_path / "one" / "final-0.safetensors")
    for name, weight in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], weight, rtol=0, atol=1e-9)


@needs_fork
def test_two_processes_stopped_and_continued_end_as_if_never_stopped(tmp_path):
    options = {"dropout": 0.2, "save_every": 6, "micro_batch": 2}
    run_together(tmp_path / "never", **options)
    run_together(tmp_path / "stopped", stop_at=9, **options)
    assert checkpoints(tmp_path / "stopped")[-1].name == "step-00000009"
    run_together(tmp_path / "stopped", **options)
    assert_same_run(tmp_path / "never", tmp_path / "stopped", n_ranks=2)
    last = checkpoints(tmp_path / "never")[-1]
    first, second = json.loads((last / "state.json").read_bytes())["random"]
    assert first["torch"] != second["torch"]  # each draws its own masks
    with pytest.raises(CheckpointError, match="processes=2, but here it is 1"):
        small_run.main(tmp_path / "never", **options)


def test_more_processes_than_rows_are_refused(monkeypatch):
    monkeypatch.setattr(training, "processes", fake_processes)
    with pytest.raises(ValueError, match="batch_size=6 has no row for each of 7"):
        train(small_model(), data, config())


class fake_processes:
    def __init__(self, device):
        pass

    def __enter__(self):
        return 0, 7

    def __exit__(self, *_):
        pass
