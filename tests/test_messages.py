"""The messages: read whole, cleaned of what gives labels away, and split without a leak."""

from collections import Counter
from itertools import combinations, product

import pytest

from support.messages import (
    MARKS,
    clean,
    group,
    jaccard,
    load_messages,
    near_duplicates,
    skeleton,
    split,
    word_pairs,
)


@pytest.fixture(scope="module")
def table():
    table = load_messages()
    table["text"] = table.text.map(clean)
    table = table.drop_duplicates("text", ignore_index=True)
    table["group"] = group(len(table), near_duplicates(table.text))
    return table


def test_every_message_is_read_and_quotation_marks_are_text():
    table = load_messages()
    assert table.label.value_counts().to_dict() == {"ham": 4220, "spam": 642}
    assert table.text.str.count('"').sum() > 100 and not table.text.str.contains("\n").any()
    assert table.text.nunique() == 4534


def test_cleaning_leaves_no_mark_of_those_who_collected_the_messages(table):
    assert clean("I  sent &lt;#&gt;  &amp; &lt;DECIMAL&gt; ") == "I sent 15 & 2.50"
    assert not any(table.text.str.contains(mark, regex=False).any() for mark in MARKS)
    assert not table.text.str.contains("&(?:lt|gt|amp);").any()
    assert (len(table), (table.label == "spam").sum()) == (4534, 561)


def test_near_duplicates_by_hand():
    texts = ["Call 0800 NOW", "call 0911 now!", "C all 0123 n.o.w", "you call me now", "me now"]
    assert skeleton(texts[0]) == skeleton(texts[2]) == "call0000now"
    assert word_pairs("Call 08 me") == {("call", "00"), ("00", "me")}
    assert word_pairs("Ok!") == {("ok",)} and word_pairs(":-)") == {()}
    assert jaccard(word_pairs(texts[3]), word_pairs(texts[4])) == 1 / 3
    assert near_duplicates(texts) == {(0, 1): 1.0, (0, 2): 1.0, (1, 2): 1.0}
    assert near_duplicates(texts, 1 / 3)[3, 4] == 1 / 3
    assert near_duplicates([]) == near_duplicates(["one"]) == {}
    with pytest.raises(ValueError, match="threshold=0"):
        near_duplicates(texts, 0)


def test_near_duplicates_are_all_pairs_that_a_slow_search_finds(table):
    texts = table.text.tolist()[:400] + table.text[table.label == "spam"].tolist()[-150:]
    pairs, bare = list(map(word_pairs, texts)), list(map(skeleton, texts))
    slow = {
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if (bare[i] and bare[i] == bare[j]) or jaccard(pairs[i], pairs[j]) >= 0.5
    }
    assert set(near_duplicates(texts)) == slow and len(slow) > 20


def test_groups_are_chains_of_pairs():
    assert group(7, {(5, 6), (0, 4), (4, 6), (2, 3)}).tolist() == [0, 1, 2, 2, 0, 0, 0]
    assert group(3, []).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_no_test_message_has_a_near_duplicate_in_training(table, seed):
    sizes = {"train": 800, "validation": 200, "test": 900}
    parts = split(table.group, table.label, sizes, seed)
    rows = [row for part in parts.values() for row in part]
    assert len(rows) == len(set(rows))
    for a, b in combinations(parts, 2):
        assert not set(table.group[parts[a]]) & set(table.group[parts[b]])
    share = (table.label == "spam").mean()
    for part, size in sizes.items():
        assert size - 2 <= len(parts[part]) <= size + 25
        assert abs((table.label[parts[part]] == "spam").mean() - share) < 0.02
    pairs = {part: list(map(word_pairs, table.text[rows])) for part, rows in parts.items()}
    bare = {
        part: set(filter(None, map(skeleton, table.text[rows]))) for part, rows in parts.items()
    }
    assert max(jaccard(a, b) for a, b in product(pairs["train"], pairs["test"])) < 0.5
    assert not bare["train"] & bare["test"]


def test_a_split_by_message_alone_leaks(table):
    """The proof above can fail: without the groups it does."""
    parts = split(range(len(table)), table.label, {"train": 800, "test": 900})
    texts = {part: list(map(word_pairs, table.text[rows])) for part, rows in parts.items()}
    assert max(jaccard(a, b) for a, b in product(texts["train"], texts["test"])) > 0.9


def test_a_split_is_repeatable_uses_all_if_asked_and_refuses_more(table):
    sizes = {"train": 2000, "test": len(table) - 2000}
    parts = split(table.group, table.label, sizes)
    assert Counter(parts["train"] + parts["test"]) == Counter(range(len(table)))
    assert parts == split(table.group, table.label, sizes)
    assert parts != split(table.group, table.label, sizes, seed=1)
    with pytest.raises(ValueError, match="5,000 rows are asked for, but there are only 4,534"):
        split(table.group, table.label, {"train": 5000})
