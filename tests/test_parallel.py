"""Several processes: sharded or not, they learn what one learns; none is left behind."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import small_run
from small_run import small_model
from together import EVALUATIONS, one_step, random_model, several_runs, together

from support.checkpoint import checkpoints, load_weights
from support.launch import torchrun
from support.parallel import data_parallel, shard
from support.train import evaluate

# In float64, where another order of a sum hardly shows.
EXACT = {"steps": 6, "warmup": 1, "lr": 0.02, "micro_batch": 2, "clip": 0.5, "double": True}
BROKEN_OFF = {"steps": 6, "dropout": 0.2, "save_every": 3, "eval_every": 3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with the runs of one process and of two, and what the two returned."""
    folder = tmp_path_factory.mktemp("runs")
    found = together(several_runs, folder, EXACT, BROKEN_OFF)
    small_run.main(folder / "one", **EXACT)
    return folder, found


# ---- sharded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_two_processes_learn_what_one_learns(runs, name):
    folder, _ = runs
    columns = ["step", "tokens", "lr", "loss", "grad_norm", "val_loss", "bits_per_byte"]
    one, other = (pd.read_csv(folder / run / "log.csv")[columns] for run in ("one", name))
    np.testing.assert_allclose(other, one, rtol=1e-9, atol=1e-9)
    assert one.loss[0] - one.loss[5] > 0.1
    files = [f"final-{rank}.safetensors" for rank in (0, 1)]
    files += [f"step-00000006/{part}.safetensors" for part in ("model", "optimizer")]
    for file in files:
        want = load_file(folder / "one" / file.replace("final-1", "final-0"))
        got = load_file(folder / name / file)
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-9, atol=1e-9)


def test_one_process_loads_what_sharded_ones_saved(runs):
    model, path = small_model().double(), runs[0] / "sharded"
    load_weights(model, checkpoints(path)[-1] / "model.safetensors")
    log = pd.read_csv(path / "log.csv")
    assert evaluate(model, EVALUATIONS) == pytest.approx(log.val_loss.iloc[-1], abs=1e-12)


def test_sharded_ones_stopped_and_continued_end_as_if_never_stopped(runs):
    never, stopped = (checkpoints(runs[0] / name)[-1] for name in ("never", "stopped"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (never / name).read_bytes() == (stopped / name).read_bytes()
    averages = load_file(never / "optimizer.safetensors")
    # All of them, although an evaluation, for which the weights are gathered, came before.
    assert len(averages) == 3 * len(list(small_model().parameters()))


def test_each_process_holds_its_chunk_and_begins_with_the_first_ones_weights(runs):
    _, (a, b) = runs
    torch.manual_seed(7)
    want, alone = one_step(random_model())
    for name, weight in want.items():
        chunks = torch.from_numpy(weight).chunk(2)
        for found, chunk in zip((a, b), chunks, strict=True):
            np.testing.assert_allclose(found["parts"][name], chunk, atol=1e-9)
        np.testing.assert_allclose(a["gathered"][name], weight, atol=1e-9)
    assert alone["averages"] == 2 * alone["parameters"] == 2 * alone["gradients"]
    assert a["held by two"] == b["held by two"] == alone
    assert {part: a["held"][part] + b["held"][part] for part in alone} == alone
    assert a["held"]["parameters"] > b["held"]["parameters"] > 0.45 * alone["parameters"]


def test_an_evaluation_gives_every_process_its_rows(runs):
    a, b = (found["evaluated"] for found in runs[1])
    assert a == b == pytest.approx(evaluate(small_model(), EVALUATIONS), abs=1e-6)


def test_what_sharded_processes_cannot_do_is_said_by_all(runs):
    for found in runs[1]:
        assert "leave out sample" in found["sample"]
        assert found["rows"] == "A batch of 1 rows has no row for each of 2 processes."


def test_alone_nothing_is_sharded_or_wrapped():
    model = small_model()
    assert shard(model) is model and data_parallel(model) is model


# ---- torchrun -----------------------------------------------------------------------------------


def test_torchrun_returns_what_is_printed_on_the_loopback(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "who = os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['MASTER_ADDR']\n"
        "time.sleep(int(os.environ['RANK']))\n"
        "print(*who, os.environ['OMP_NUM_THREADS'], sys.argv[1:], flush=True)\n"
    )
    seen = []
    said = torchrun(script, "a", watch=lambda workers: seen.extend(p.pid for p in workers))
    assert said == "0 2 127.0.0.1 1 ['a']\n1 2 127.0.0.1 1 ['a']\n"
    assert len(set(seen)) == 2


def test_torchrun_that_fails_or_hangs_is_an_error_and_leaves_nothing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "if os.environ['RANK'] == '1':\n    raise SystemExit('no more of this')\n"
        "time.sleep(600)\n"
    )
    seen = []
    with pytest.raises(RuntimeError, match=r"script.py ended with 1:\nno more of this$"):
        torchrun(script, watch=lambda workers: seen.extend(p.pid for p in workers))
    script.write_text("import time\ntime.sleep(600)\n")

    def watch(workers):
        seen.extend(p.pid for p in workers)
        if len(workers) == 2:
            raise TimeoutError("as after its time")

    with pytest.raises(TimeoutError):
        torchrun(script, watch=watch)
    with pytest.raises(TimeoutError, match="script.py has not ended within timeout=0.1 s"):
        torchrun(script, timeout=0.1)
    assert len(set(seen)) >= 4 and not any(map(psutil.pid_exists, seen))
