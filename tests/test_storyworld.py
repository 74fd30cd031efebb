"""The story world: correct English from every phrasing, true facts, and splits that do not leak."""

import itertools
import random
import re
from dataclasses import replace

import pytest

from support.storyworld import draw_facts, openings, plots, retell, stories, tell, vocabulary

SLIPS = {
    "a field or a choice was left unfilled": r"[{}\[\]|]",
    "a before a vowel, or an before a consonant": r"\b[Aa] (?:[aeio]|hour)|\b[Aa]n [^aeiouhAEIOUH ]",
    "a word twice": r"\b(\w+) \1\b(?<!had had)(?<!that that)(?<!very very)",
    "two spaces, or one before a comma": r"  | [,.!?;:]",
    "a sentence that begins with a small letter": r"(?:^|[.?!] |\n\n)[a-z]|[.] ?[\"”] [a-z]",
    "a sentence without an end": r"[\w,;]\s*(?:\n\n|$)",
    "doubled punctuation": r"[,;:][,.;:!?]|[.!?][,.;:]|(?<!\.)\.\.(?!\.)",
    "an apostrophe or a dash that is not plain": r"[’‘“”–—…]",
}


def slips(text: str) -> list[str]:
    """Return what is wrong with a story's English, as far as patterns can tell."""
    found = [f"{name}: {m[0]!r}" for name, slip in SLIPS.items() if (m := re.search(slip, text))]
    if any(paragraph.count('"') % 2 for paragraph in text.split("\n\n")):
        found.append("a quotation that does not end")
    return found


def tales(plot: str, number: int):
    """Return `number` stories of one plot."""
    rng = random.Random(f"test {plot}")
    found = []
    while len(found) < number:
        facts = draw_facts(rng)
        found += [tell(facts, rng.random())] if facts.plot == plot else []
    return found


@pytest.mark.parametrize("plot", plots())
def test_a_plot_is_well_written_and_keeps_its_facts(plot):
    for story in tales(plot, 60):
        text, facts = story.text, story.facts
        assert slips(text) == [], text
        assert text.count("\n\n") == 2, text
        assert 55 <= len(text.split()) <= 220, f"{len(text.split())} words\n{text}"
        assert f"{facts.look} {facts.object}" in text, f"the {facts.look} {facts.object}\n{text}"
        assert facts.place in text, f"{facts.place}\n{text}"
        assert f"{facts.hero.species}" in text.split("\n\n")[0], text
        assert f"{facts.friend.species}" in text and facts.friend.name in text, text
        assert facts.hero.name in text.split("\n\n")[2], f"the hero is not in the ending\n{text}"
        first_friend = text.index(facts.friend.name)
        introduced = text[max(0, first_friend - 90) : first_friend + 120]
        assert facts.friend.species in introduced, f"who is {facts.friend.name}?\n{text}"


@pytest.mark.parametrize("plot", plots())
def test_a_plot_has_several_phrasings_for_every_sentence(plot):
    assert list(plots()[plot].sections) == ["beginning", "problem", "middle", "happy", "sad"]
    for name, sentences in plots()[plot].sections.items():
        assert len(sentences) >= 2, name
        for phrasings in sentences:
            assert len(phrasings) >= 3 and len(set(phrasings)) == len(phrasings), phrasings
            for phrasing in phrasings:
                assert phrasing.count("[") == phrasing.count("]"), phrasing
