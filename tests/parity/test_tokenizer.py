"""The tokenizer equals tiktoken's "gpt2", and learns what two other trainers learn."""

import json
import random
import unicodedata
from collections import Counter
from itertools import islice, pairwise, takewhile

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from support import data
from support.tokenizer import GPT2_PATTERN, BPETokenizer, byte_letters

# Each library brings the Unicode tables of its year, so characters that this Python does not know
# yet ("Cn"), and surrogates ("Cs"), are left out of what is compared.
KNOWN = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
FAST = settings(deadline=None, max_examples=500, derandomize=True, database=None)
END = "<|endoftext|>"
SPACES = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u180e\u2000\u200a\u200b\u2028\u2029\u202f"
SPACES += "\u205f\u2060\u3000\ufeff"
SAMPLES = {
    "code": "def f(x):\n\treturn {k: v**2 for k, v in x.items() if k}  # ok?\n\n\n    pass\n",
    "more code": '#include <stdio.h>\r\nint main() { printf("%d\\n", 0x1F & ~a[i++]); }\r\n\r\n',
    "contractions": "I'll we've they're don't it's I'm he'd 'tis O'Neill O'Tis MAN'Self 's's' ''ve",
    "curly quotes": "“Don’t,” she said — ‘it’s …’ «voilà»",
    "emoji": "😀👍🏽 👩\u200d👩\u200d👧\u200d👦❤\ufe0f🏳\ufe0f\u200d🌈 🇩🇪🇫🇷 1\ufe0f\u20e3",
    "scripts": "你好，世界。今日は 안녕하세요 مرحبا بالعالم؟ שלום नमस्ते ไทย Ελληνικά Привет İıŞş",
    "marks": "e\u0301 Z̸̢a̷l̴g̵o̶ ﬁ Å Ⅷ ½ x² ٣٤ १२ 一二 𝟘𝟙 ①",
    "white space": "  a   b\t\tc \n d\n\n  e \t\n   ",
    "odd spaces": "".join(f"a{s}b {s}{s}c{s} {s}d{s}1{s}!{s}" for s in SPACES) + SPACES,
    "numbers": "3.14159 1,000,000 2026-11-22 +49 (0)30 1e-5 0b1010",
    "special": f"a{END}b <|endoftext|  |> {END}{END} {END}\n",
    "empty": "",
}
characters = st.characters(exclude_categories=["Cn", "Cs"])
texts = st.text(characters) | st.lists(
    st.sampled_from([*SPACES, *"aZé1٣!’'日ع😀\u200d\ufe0f\u0301", "'ll", "'s", " the", END])
).map("".join)


@pytest.fixture(scope="module")
def mine():
    return BPETokenizer.gpt2()


@pytest.fixture(scope="module")
def theirs():
    return data.tiktoken_gpt2()


@pytest.fixture(scope="module")
def shakespeare():
    if not (data.DATA / "cache" / "shakespeare" / "shakespeare.txt").exists():
        pytest.skip("Shakespeare is not in data/cache: run `make data`.")
    return data.load_text("shakespeare")


def check(mine, theirs, text):
    ids = mine.encode(text)
    assert ids == theirs.encode(text, disallowed_special=())
    assert mine.decode(ids) == text
    ids = mine.encode(text, {END})
    assert ids == theirs.encode(text, allowed_special={END}, disallowed_special=())
    assert mine.decode(ids) == text


# ---- GPT-2 --------------------------------------------------------------------------------------


def test_vocabulary(mine, theirs):
    assert mine.vocab_size == theirs.n_vocab == 50_257
    assert mine.special_tokens == {END: theirs.eot_token}
    assert mine.vocab == theirs._mergeable_ranks


@pytest.mark.parametrize("name", SAMPLES)
def test_samples(mine, theirs, name):
    check(mine, theirs, SAMPLES[name])


@FAST
@given(texts)
@example("\x1c\x1d a\x1e")
def test_hypothesis_texts(mine, theirs, text):
    check(mine, theirs, text)


def test_every_character(mine, theirs):
    letters = [c for c in KNOWN if unicodedata.category(c) != "Co"]  # not the private planes
    for start in range(0, len(letters), 100):
        text = "".join(f"a{c}1 {c}{c}  {c}'s" for c in letters[start : start + 100])
        assert mine.encode(text) == theirs.encode_ordinary(text)


def test_random_texts_of_all_planes(mine, theirs):
    rng = random.Random(0)
    common = [*SPACES, *map(chr, range(128)), "\u200d", "\ufe0f"]
    for _ in range(500):
        letters = rng.choices(KNOWN, k=20) + rng.choices(common, k=40)
        rng.shuffle(letters)
        check(mine, theirs, "".join(letters))


@FAST
@given(st.text(st.characters(exclude_categories=["Cn"]) | st.sampled_from("\ud83d\ude00a ")))
def test_surrogates(mine, theirs, text):
    assert mine.encode(text) == theirs.encode(text, disallowed_special=())


@pytest.mark.parametrize("run", ["a", " ", "\n", "\t\n", " \u3000", "!", "7", "ab", "é", "the "])
@pytest.mark.parametrize("after", ["", "b", "\n"])
def test_long_runs(mine, theirs, run, after):
    for n in (1, 2, 3, 31, 500):
        check(mine, theirs, run * n + after)


def test_real_text(mine, theirs, shakespeare):
    ids = mine.encode(shakespeare)
    assert len(shakespeare) > 4_700_000
    assert ids == theirs.encode_ordinary(shakespeare)
    assert mine.decode(ids) == shakespeare
    part = shakespeare[:200_000]
    assert list(mine.encode_iterable(part.splitlines(keepends=True))) == mine.encode(part)


@FAST
@given(st.lists(st.integers(0, 50_256)))
def test_any_ids_decode_to_the_same_text(mine, theirs, ids):
    assert mine.decode(ids) == theirs.decode(ids)


# ---- training -----------------------------------------------------------------------------------


def count_words(text):
    words = Counter(regex.findall(GPT2_PATTERN, text))
    return {tuple(bytes([b]) for b in word.encode()): n for word, n in words.items()}


def slow_merges(words):
    """Yield each merge and whether another pair was as frequent, counting all pairs every time."""
    while True:
        counts = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                counts[pair] += n
        if not counts:
            return
        most = max(counts.values())
        best = max(pair for pair, n in counts.items() if n == most)
        yield best, sum(n == most for n in counts.values()) > 1
        words = {merge(word, best): n for word, n in words.items()}


def merge(word, pair):
    merged = ()
    while word:
        joined = word[:2] == pair
        merged += (word[0] + word[1],) if joined else (word[0],)
        word = word[2:] if joined else word[1:]
    return merged


def check_training(text, vocab_size):
    trained = BPETokenizer.train(text, vocab_size)
    slow = [pair for pair, _ in islice(slow_merges(count_words(text)), vocab_size - 256)]
    assert trained.merges == slow
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in slow]
    assert trained.vocab == {token: i for i, token in enumerate(tokens)}
    assert trained.decode(trained.encode(text)) == text


@FAST
@given(
    st.text("ab ", min_size=1) | st.text("aébcd' \n1", min_size=1) | st.text(min_size=1),
    st.integers(256, 300),
)
@example("aaaa aaaaa aaaaaaa", 300)
@example("abababab bababa", 300)
def test_training_equals_counting_again_after_every_merge(text, vocab_size):
    check_training(text, vocab_size)


def test_training_on_a_scene(shakespeare):
    start = shakespeare.index("HAMLET:\nTo be, or not to be")
    check_training(shakespeare[start : start + 20_000], 456)


def test_wikipedia_example():
    trained = BPETokenizer.train("aaabdaaabac", 259)
    assert trained.merges == [(b"a", b"a"), (b"aa", b"a"), (b"aaa", b"b")]
    assert trained.encode("aaabdaaabac") == [258, ord("d"), 258, ord("a"), ord("c")]  # XdXac


@pytest.mark.parametrize("seed", [0, 2, 4, 5])
def test_training_equals_hugging_face_until_the_first_tie(seed):
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(400)]
    text = " ".join(word for word in words for _ in range(rng.randint(1, 400)))
    untied = takewhile(lambda merge_tie: not merge_tie[1], slow_merges(count_words(text)))
    expected = [pair for pair, _ in untied]
    assert len(expected) > 45
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    letters = pre_tokenizers.ByteLevel.alphabet()
    size = 256 + len(expected)
    theirs.train_from_iterator(
        [text],
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, show_progress=False),
    )
    byte_of, found = byte_letters(), json.loads(theirs.to_str())["model"]["merges"]
    found = [tuple(bytes(byte_of[letter] for letter in token) for token in pair) for pair in found]
    assert BPETokenizer.train(text, size).merges == found == expected
