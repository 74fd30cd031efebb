"""The tokenizer alone: special tokens, files, streams, odd texts and wrong inputs."""

import os
import pickle
import random
import time
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.tokenizer import GPT2_PATTERN, BPETokenizer

FAST = settings(deadline=None, max_examples=300, derandomize=True, database=None)
TEXT = "low lower lowest new newer newest wide wider widest, don't you'll we've\n\n" * 20
SPECIAL = ["<|end|>", "<|end|>more", "<pad>"]
tokenizer = BPETokenizer.train(TEXT, 290, SPECIAL)
END, MORE, PAD = (tokenizer.special_tokens[name] for name in SPECIAL)

fragments = st.lists(
    st.sampled_from([*"abé '\t\n\r1!\u3000\x85\x1c\u200b😀", "  ", "lower", "'ll", "<|end|>more"])
    | st.sampled_from(["\ud83d", "\ude00", "<|end|>", "<|", "\n\n", "newest", "<pad>"])
    | st.characters(),
    max_size=25,
).map("".join)


# ---- encode and decode --------------------------------------------------------------------------


@FAST
@given(fragments)
def test_round_trip(text):
    valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokenizer.encode(text)) == valid
    assert tokenizer.decode(tokenizer.encode(text, "all")) == valid


@pytest.mark.parametrize("text", ["", " ", "\t", "\n", "\n\n \n", "\t\tif x:\n\t\t\treturn", "\0"])
def test_white_space_is_kept(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_surrogates_are_read_as_tiktoken_reads_them():
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")
    assert tokenizer.decode(tokenizer.encode("a\ud83d b")) == "a\ufffd b"
    assert tokenizer.decode(tokenizer.encode("\ufeffa\ude00")) == "\ufeffa\ufffd"


def test_learned_words_are_single_tokens():
    assert len(tokenizer.encode(" lowest newest")) == 2
    assert tokenizer.encode("low\tlow")[1] == ord("\t")


def test_ids_in_any_row():
    ids = tokenizer.encode("we've wider é😀")
    rows = [
        tuple(ids),
        iter(ids),
        np.array(ids),
        np.array(ids, dtype=np.uint16),
        list(np.array(ids)),
    ]
    for row in [*rows, torch.tensor(ids), torch.tensor(ids, dtype=torch.int32)]:
        assert tokenizer.decode(row) == "we've wider é😀"
    assert tokenizer.decode([]) == tokenizer.decode(torch.tensor([], dtype=torch.long)) == ""


def test_invalid_utf8_is_replaced():
    assert tokenizer.decode([0xE2, 0x82]) == "\ufffd"
    assert tokenizer.decode([0xE2, 0x82, 0xAC, 0xFF, 65]) == "€\ufffdA"


def test_encoding_twice_gives_separate_lists():
    tokenizer.encode("lowest").append(-1)
    assert -1 not in tokenizer.encode("lowest")


def test_copies_work_in_other_processes():
    assert pickle.loads(pickle.dumps(tokenizer)).encode(TEXT, "all") == tokenizer.encode(TEXT)


@pytest.mark.parametrize("bad", [-1, tokenizer.vocab_size, 1.5, "a", None, [1, 2], torch.tensor(1)])
def test_what_is_no_id(bad):
    with pytest.raises(ValueError, match="is no token id: .* from 0 to 289") as error:
        tokenizer.decode([65, bad])
    assert repr(bad) in str(error.value)


def test_two_rows_of_ids():
    for rows in ([[1, 2], [3, 4]], np.array([[1, 2]]), torch.ones(2, 500, dtype=torch.long)):
        with pytest.raises(ValueError, match="is no token id: give one row") as error:
            tokenizer.decode(rows)
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("bad", [None, b"bytes", ["a", "list"], 7])
def test_what_is_no_text(bad):
    for use in (tokenizer.encode, lambda text: BPETokenizer.train(text, 300)):
        with pytest.raises(TypeError, match=f"must be a str, not {type(bad).__name__}"):
            use(bad)


# ---- special tokens -----------------------------------------------------------------------------


def test_special_tokens_only_when_allowed():
    text = "a<|end|>b<pad>"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.encode(text, {"<|end|>"}) == [97, END, *b"b<pad>"]
    assert tokenizer.encode(text, "all") == tokenizer.encode(text, SPECIAL) == [97, END, 98, PAD]
    assert tokenizer.decode([97, END, 98, PAD]) == text
    assert tokenizer.vocab_size == max(END, MORE, PAD) + 1 == 290


def test_a_string_alone_is_one_name():
    assert tokenizer.encode("<|end|>", "<|end|>") == [END]
    assert tokenizer.encode("<|end|>", "") == tokenizer.encode("<|end|>")
    assert BPETokenizer.train("aa", 300, "<|end|>").special_tokens == {"<|end|>": 257}


def test_longest_special_token_first():
    for allowed in (SPECIAL, SPECIAL[::-1], "all"):
        assert tokenizer.encode("<|end|>more<|end|>mor", allowed) == [MORE, END, *b"mor"]
    assert tokenizer.encode("<|end|>more", "<|end|>") == [END, *b"more"]


def test_unknown_special_token():
    for use in (tokenizer.encode, lambda text, names: list(tokenizer.encode_iterable(text, names))):
        with pytest.raises(ValueError, match=r"No special token '<eos>', only \['<|end|>', "):
            use("text", ["<eos>", "<pad>"])


def test_repeated_special_token_counts_once():
    trained = BPETokenizer.train("aa", 259, ["<a>", "<b>", "<a>"])
    assert trained.special_tokens == {"<a>": 257, "<b>": 258}
    assert trained.merges == [(b"a", b"a")]


# ---- streams ------------------------------------------------------------------------------------


@FAST
@given(fragments, st.lists(st.integers(0, 60)), st.sampled_from([(), "all", "<|end|>"]))
@example("a <|end|> b", list(range(12)), "all")
@example("\ud83d\ude00 \ud83d \ude00", list(range(6)), ())
@example("x  \n\n  y 'll\n", list(range(15)), ())
def test_stream_equals_whole_however_it_is_cut(text, cuts, allowed):
    cuts = [0, *sorted(cuts), len(text)]
    chunks = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    assert list(tokenizer.encode_iterable(chunks, allowed)) == tokenizer.encode(text, allowed)


@pytest.mark.parametrize("size", [1, 9, 30])
def test_stream_holds_only_the_last_word(size):
    text = "newest lo" * 3000
    pulled = 0

    def chunks():
        nonlocal pulled
        for start in range(0, len(text), size):
            pulled += 1
            yield text[start : start + size]

    ids = tokenizer.encode_iterable(chunks())
    for i, expected in enumerate(islice(tokenizer.encode(text), 1000)):
        assert next(ids) == expected
        assert (pulled - 2) * size <= (i + 1) * len(" lonewest")


def test_stream_of_lines_and_of_letters(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    with path.open() as lines:
        assert list(tokenizer.encode_iterable(lines)) == tokenizer.encode(TEXT)
    assert list(tokenizer.encode_iterable(TEXT)) == tokenizer.encode(TEXT)
    assert list(tokenizer.encode_iterable([])) == []


def test_stream_refuses_special_tokens_with_white_space():
    spaced = BPETokenizer.train("aa", 300, ["<my end>"])
    assert list(spaced.encode_iterable(["<my", " end>"])) == spaced.encode("<my end>")
    with pytest.raises(ValueError, match="'<my end>' has white space, .* use encode"):
        list(spaced.encode_iterable(["<my", " end>"], "all"))


# ---- training -----------------------------------------------------------------------------------


def test_vocabulary_of_the_size_asked_for():
    ids = sorted([*tokenizer.vocab.values(), *tokenizer.special_tokens.values()])
    assert ids == list(range(290))


@pytest.mark.parametrize(
    ("text", "merges"),
    [
        ("a", []),
        ("a b c", [(b" ", b"c"), (b" ", b"b")]),
        ("aaaa", [(b"a", b"a"), (b"aa", b"aa")]),  # and no (aa, a), which stands nowhere
        ("aaa", [(b"a", b"a"), (b"aa", b"a")]),
    ],
)
def test_too_little_text_ends_early(text, merges):
    trained = BPETokenizer.train(text, 1000, ["<|end|>"])
    assert trained.merges == merges
    assert trained.special_tokens == {"<|end|>": 256 + len(merges)}
    assert trained.vocab_size == 257 + len(merges)


def test_vocabulary_too_small():
    assert BPETokenizer.train(TEXT, 257, ["<pad>"]).merges == []
    with pytest.raises(ValueError, match="vocab_size=257 must be at least 258"):
        BPETokenizer.train(TEXT, 257, ["<pad>", "<end>"])


def test_empty_text_teaches_nothing():
    assert BPETokenizer.train("", 256).encode("é") == list("é".encode())
    with pytest.raises(ValueError, match="text is empty"):
        BPETokenizer.train("", 257)


def test_merges_never_cross_special_tokens():
    trained = BPETokenizer.train("ab<|end|>ab<|end|>" * 50, 400, ["<|end|>"])
    assert trained.merges == [(b"a", b"b")]
    assert trained.encode("ab<|end|>ab", "all") == [256, 257, 256]
    assert (b"<", b"|") in BPETokenizer.train("ab<|end|>" * 50, 400).merges


def test_merges_never_cross_pieces():
    for token in BPETokenizer.train("it's 2 o'clock, 12 x\n\n" * 9, 400).vocab:
        assert len(token) == 1 or not {*b" '"} & {*token[1:]}


@pytest.mark.parametrize("letters", ["a", " ", "\n", "é", "ab", "abcdefghijklmnopqrstuvwxyz"])
def test_long_runs_take_seconds(letters):
    text = "".join(random.Random(0).choices(letters, k=100_000))
    start = time.perf_counter()
    trained = BPETokenizer.train(text, 300)
    ids = trained.encode(text)
    assert list(trained.encode_iterable(text)) == ids
    assert time.perf_counter() - start < 60
    assert trained.decode(ids) == text
    assert len(ids) < len(text.encode())


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "tokenizer.json"
    tokenizer.save(path)
    return BPETokenizer.load(str(path))


@FAST
@given(text=fragments)
def test_loaded_equals_saved(loaded, text):
    ids = tokenizer.encode(text, "all")
    assert loaded.encode(text, "all") == ids
    assert loaded.decode(ids) == tokenizer.decode(ids)


def test_loaded_has_the_same_parts(loaded):
    for part in ("vocab", "merges", "special_tokens", "pattern", "vocab_size"):
        assert getattr(loaded, part) == getattr(tokenizer, part)


def test_save_keeps_another_pattern(tmp_path):
    pattern = r"\p{N}|" + GPT2_PATTERN
    digits = BPETokenizer(tokenizer.vocab, tokenizer.merges, {}, pattern)
    digits.save(tmp_path / "digits.json")
    assert BPETokenizer.load(tmp_path / "digits.json").pattern == pattern


def test_save_writes_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    before = path.read_bytes()

    def replace(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        BPETokenizer.train("other", 257).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


SAVED = b'{"vocab": {"a": 0}, "merges": [], "special_tokens": {}, "pattern": "."}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        SAVED[:-10],
        SAVED.replace(b'"merges": [], ', b""),
        SAVED.replace(b'"a"', b'"\\u0120a"'),
        SAVED.replace(b'{"a": 0}', b"[]"),
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
        b"[1, 2, 3]",
        b"null",
        b"\x89PNG\r\n\x1a\n" * 1000,
        b"#version: 0.2\n\xc4\xa0 t\n",
    ],
)
def test_files_of_another_kind(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a whole file written by `save`") as error:
        BPETokenizer.load(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 200


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"):
        BPETokenizer.load(tmp_path / "none.json")
