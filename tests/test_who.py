"""The sentences of "who did what to whom": what counting can know of them, and what it cannot."""

import re
from collections import Counter, defaultdict

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from support.who import KNOWN, NEW, animals, sentences, who_did_it


def words(text):
    return re.findall(r"\w+", text.lower())


@pytest.mark.parametrize("part", who_did_it())
def test_no_bag_of_words_knows_who_it_was(part):
    bags = defaultdict(Counter)
    for text, who in who_did_it()[part]:
        bags[tuple(sorted(words(text)))][who] += 1
    for answers in bags.values():
        assert len(answers) == 2 and len(set(answers.values())) == 1


def test_runs_of_three_words_are_at_chance():
    told = who_did_it()
    model = make_pipeline(CountVectorizer(ngram_range=(1, 3)), LogisticRegression(max_iter=100))
    model.fit(*zip(*told["training"][:1000], strict=True))
    for part in ("new pairs", "new pairs, new wordings"):
        assert 0.4 < model.score(*zip(*told[part], strict=True)) < 0.6


def test_pairs_and_wordings_of_the_test_are_new():
    met = {
        part: {frozenset(set(words(text)) & set(animals())) for text, _ in made}
        for part, made in who_did_it().items()
    }
    assert all(len(pair) == 2 for pairs in met.values() for pair in pairs)
    assert not met["training"] & (met["new pairs"] | met["new pairs, new wordings"])
    assert not set(KNOWN) & set(NEW)


@pytest.mark.parametrize("wording", KNOWN + NEW)
def test_a_sentence_reads_well_and_its_label_is_who_did_it(wording):
    for text, who in sentences([("fox", "owl"), ("bear", "hen")], [wording], 40, 0):
        assert text[0].isupper() and text.endswith(".") and "{" not in text
        passive = re.search(r" was \w+ by ", text)
        named = [word for word in words(text) if word in animals()]
        assert animals()[who] == named[1 if passive else 0]


def test_the_same_seed_gives_the_same_sentences():
    assert sentences([("fox", "owl")], KNOWN, 10, 3) == sentences([("fox", "owl")], KNOWN, 10, 3)
    assert sentences([("fox", "owl")], KNOWN, 10, 3) != sentences([("fox", "owl")], KNOWN, 10, 4)
