"""Endless short stories for children, each with its facts: a corpus of which all is known.

What is written by hand lies in `data/storyworld`: the cast and the props in `words.toml`, and the
plots, in which every sentence has several phrasings. Its README tells how to write one.
"""

import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256

from support.data import DATA

FOLDER = DATA / "storyworld"
PRONOUNS = {  # he, him, his, himself
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
}
CHOICE = r"\[([^\[\]]*)\]"  # [big|huge], the innermost first
SPLITS = {"train": range(10, 100), "validation": range(5, 10), "test": range(0, 5)}  # per cent


@dataclass(frozen=True)
class Character:
    """Someone in a story."""

    name: str
    species: str
    trait: str
    pronoun: str  # "he" or "she"


@dataclass(frozen=True)
class Facts:
    """What is true in a story.

    `problem` is a word such as "lost", "stuck" or "afraid"; `ending` is "happy" or "sad".
    """

    plot: str
    problem: str
    hero: Character
    friend: Character
    place: str
    object: str
    look: str  # what the object looks like: "red"
    weather: str
    ending: str
    helps: str  # when the friend helps: "always", "happy" (only if it ends so) or "never"

    @property
    def helper(self) -> Character | None:
        """Who helped the hero, if anyone."""
        return self.friend if self.helps in ("always", self.ending) else None

    @property
    def lost(self) -> str | None:
        """The object, if the story is about how it was lost."""
        return self.object if self.problem == "lost" else None

    @property
    def split(self) -> str:
        """The only split in which stories of this combination occur: train, validation or test.

        Plot, hero's species, place and object make a combination; its hash decides.
        """
        combination = f"{self.plot}, {self.hero.species}, {self.place}, {self.object}"
        percent = int.from_bytes(sha256(combination.encode()).digest()[:8]) % 100
        return next(split for split, percents in SPLITS.items() if percent in percents)


@dataclass(frozen=True)
class Story:
    """A text of three paragraphs, what is true in it, and the seed that chose its words."""

    text: str
    facts: Facts
    seed: int | float | str


@dataclass
class Plot:
    """A story's outline: whom and what it needs, and the phrasings of every sentence."""

    name: str
    needs: dict[str, str]
    sections: dict[str, list[list[str]]] = field(default_factory=dict)


def stories(seed: int = 0, split: str = "train") -> Iterator[Story]:
    """Yield stories without end, the same for the same seed.

    No combination of plot, hero's species, place and object occurs in two splits.
    Raises ValueError for a split that is not "train", "validation" or "test".
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}: choose {', '.join(SPLITS)}.")
    rng = random.Random(f"{split} {seed}")
    while True:
        if (facts := draw_facts(rng)).split == split:
            yield tell(facts, rng.random())


def draw_facts(rng: random.Random) -> Facts:
    """Draw a plot, then a cast, a place and an object that suit it."""
    plot, words = rng.choice(list(plots().values())), vocabulary()
    species = [rng.choice(matching("species", plot.needs[role])) for role in ("hero", "friend")]
    while species[0] == species[1]:  # so that "the fox" is one of them
        species = [rng.choice(matching("species", plot.needs[role])) for role in ("hero", "friend")]
    cast, traits = [], rng.sample(words["traits"], 2)
    for kind, trait in zip(species, traits, strict=True):
        pronoun = words["species"][kind].get("pronoun") or rng.choice(("he", "she"))
        names = [name for name in words["names"][pronoun] if name not in [c.name for c in cast]]
        cast.append(Character(rng.choice(names), kind, trait, pronoun))
    thing = rng.choice(matching("objects", plot.needs["object"]))
    return Facts(
        plot=plot.name,
        problem=plot.needs["problem"],
        hero=cast[0],
        friend=cast[1],
        place=rng.choice(matching("places", plot.needs["place"])),
        object=thing,
        look=rng.choice(words["objects"][thing]["looks"].split()),
        weather=rng.choice(matching("weather", plot.needs["weather"])),
        ending=rng.choice(("happy", "sad")),
        helps=plot.needs["helper"],
    )


def tell(facts: Facts, seed: int | float | str = 0) -> Story:
    """Put facts into words; another seed finds other words.

    With the same seed, the story of other facts has the same phrasings as far as it can: only what
    the facts change is different.
    """
    plot, fields = plots()[facts.plot], _fields(facts)
    sections = plot.sections | {"opening": openings()[plot.needs["opening"]]}

    def say(name: str) -> str:  # each section draws by itself: another ending changes no beginning
        return _say(random.Random(f"{seed} {name}"), sections[name], fields)

    paragraphs = (("opening", "beginning"), ("problem", "middle"), (facts.ending,))
    text = "\n\n".join(" ".join(map(say, paragraph)) for paragraph in paragraphs)
    return Story(text, facts, seed)


def tell_ending(facts: Facts, seed: int | float | str = 0) -> str:
    """Return only the last paragraph of `tell(facts, seed)`."""
    sentences = plots()[facts.plot].sections[facts.ending]
    return _say(random.Random(f"{seed} {facts.ending}"), sentences, _fields(facts))


def ending_sentences(facts: Facts) -> list[str]:
    """Return all that can stand in the last paragraph of a story with these facts."""
    fields = _fields(facts)
    return [_finish(text, fields) for text in _ending_phrasings(facts.plot, facts.ending)]


def retell(story: Story, **changes) -> Story:
    """Tell a story in the same words but with other facts, such as `ending="sad"`."""
    return tell(replace(story.facts, **changes), story.seed)


# What no story should have; patterns cannot find everything, but what they find is wrong.
SLIPS = {
    "a field or a choice left unfilled": r"[{}\[\]|]",
    "a before a vowel, or an before none": r"\b[Aa] (?:[aei]|o(?!ne|nce))|\b[Aa]n [^aeiouhAEIOUH ]",
    "a word twice": r"\b(\w+) \1\b(?<!had had)(?<!that that)(?<!very very)",
    "a space too many": r"  | [,.!?;:]",
    "a small letter at the start of a sentence": r"(?:^|[.?!] |\n\n)[a-z]|\. ?\" [a-z]",
    "a paragraph without an end": r"[\w,;]\s*(?:\n\n|$)",
    "doubled punctuation": r"[,;:][,.;:!?]|[.!?][,.;:]",
    "an apostrophe, a quotation mark or a dash that is not plain": r"[’‘“”–—…]",
}


def slips(text: str) -> list[str]:
    """Return what is wrong with a story's English, as far as patterns can tell."""
    found = [f"{name}: {m[0]!r}" for name, slip in SLIPS.items() if (m := re.search(slip, text))]
    if any(paragraph.count('"') % 2 for paragraph in text.split("\n\n")):
        found.append("a quotation that does not end")
    return found


def review(continuation: str, facts: Facts, ended: bool) -> dict[str, bool]:
    """Return which tests a continued story passes, by name of the test.

    Args:
        continuation: what was written after a beginning that tells the hero, place and object.
        facts: those of the beginning.
        ended: whether the writer stopped by itself.
    """
    names = {name for group in vocabulary()["names"].values() for name in group}
    found = set(re.findall(r"[A-Za-z]+", continuation))
    return {
        "keeps the name": facts.hero.name in found and len(found & names - {facts.hero.name}) <= 1,
        "mentions the object": facts.object in found,
        "is grammatical": not slips(continuation),
        "spells well": {word.lower() for word in found} <= lexicon(),
        "ends": ended and continuation.rstrip().endswith((".", "!", "?", '"')),
    }


def _say(rng: random.Random, sentences: list[list[str]], fields: dict[str, str]) -> str:
    """Choose a phrasing of each sentence and fill in the fields."""
    text = " ".join(filter("-".__ne__, (rng.choice(phrasings) for phrasings in sentences)))
    while "[" in text:
        text = re.sub(CHOICE, lambda m: rng.choice(m[1].split("|")), text, count=1)
    return _finish(text, fields)


@cache
def _ending_phrasings(plot: str, ending: str) -> list[str]:
    """Return the phrasings of all sentences of an ending, with every choice made in every way."""
    texts = [p for phrasings in plots()[plot].sections[ending] for p in phrasings if p != "-"]
    done = []
    while texts:
        text = texts.pop()
        if choice := re.search(CHOICE, text):
            before, after = text[: choice.start()], text[choice.end() :]
            texts += [before + option + after for option in choice[1].split("|")]
        else:
            done.append(text)
    return done


def _finish(text: str, fields: dict[str, str]) -> str:
    """Fill in the fields, and set right what they change."""
    text = re.sub(r"\{([^{}]*)\}", lambda m: _fill(m[1], fields), text)
    text = re.sub(r" {2,}", " ", text)
    # "a" before a vowel, as in "an owl" and "an hour", but "a unicorn"
    return re.sub(r"\b([Aa]) (?=[aeiAEI]|[oO](?!ne|nce)|[uU](?!ni|se)|hour|honest)", r"\1n ", text)


def _fill(name: str, fields: dict[str, str]) -> str:
    value = fields[name[0].lower() + name[1:]]
    return value[0].upper() + value[1:] if name[0].isupper() else value


def _fields(facts: Facts) -> dict[str, str]:
    """Return what may stand between braces in a plot, and what it becomes."""
    words = vocabulary()
    place = words["places"][facts.place]
    fields = {
        "place": f"the {facts.place}",
        "in place": place["in"],
        "to place": place["to"],
        "object": facts.object,
        "look": facts.look,
        "weather": facts.weather,
    }
    for role, who in (("hero", facts.hero), ("friend", facts.friend)):
        species = words["species"][who.species]
        about = PRONOUNS[who.pronoun] | {
            "kind": who.species,
            "trait": who.trait,
            "hand": species["hand"],
            "hands": species["hands"],
            "home": species["home"],
        }
        fields |= {role: who.name} | {f"{role} {key}": value for key, value in about.items()}
        if role == "hero":
            fields |= PRONOUNS[who.pronoun]
    return fields


# ---- what is written by hand --------------------------------------------------------------------


@cache
def vocabulary() -> dict:
    """Return `words.toml`: names, species, traits, places, objects and weather."""
    return tomllib.loads((FOLDER / "words.toml").read_text(encoding="utf-8"))


@cache
def matching(group: str, need: str) -> list[str]:
    """Return the words of a group that fit what a plot needs, such as "kite, small !bird".

    Commas set apart ways to fit: a word must have all the kinds that are named, its own name being
    one, and none that has a "!"; or "any". Raises ValueError if nothing fits.
    """
    words = vocabulary()[group]

    def fits(word: str, option: str) -> bool:
        kinds = [word] + (words[word]["kinds"].split() if isinstance(words, dict) else [])
        return option == "any" or all(
            kind[1:] not in kinds if kind.startswith("!") else kind in kinds
            for kind in option.split()
        )

    options = [option.strip() for option in need.split(",")]
    found = [word for word in words if any(fits(word, option) for option in options)]
    if not found:
        raise ValueError(f"No {group} fit {need!r}: see {FOLDER / 'words.toml'}.")
    return found


@cache
def plots() -> dict[str, Plot]:
    """Return every plot by name, in the order of their names."""
    found = {}
    for path in sorted((FOLDER / "plots").glob("*.md")):
        found |= _read_plots(path.read_text(encoding="utf-8"))
    return dict(sorted(found.items()))


@cache
def lexicon() -> frozenset[str]:
    """Return every word that can stand in a story, in small letters."""
    paths = FOLDER / "words.toml", FOLDER / "openings.md", *(FOLDER / "plots").glob("*.md")
    text = " ".join(path.read_text(encoding="utf-8") for path in paths)
    made = {"an", *PRONOUNS["he"].values(), *PRONOUNS["she"].values()}  # by the program
    return frozenset(re.findall("[a-z]+", text.lower())) | made


@cache
def openings() -> dict[str, list[list[str]]]:
    """Return the ways to begin a story and to introduce its hero, by kind of opening."""
    (plot,) = _read_plots((FOLDER / "openings.md").read_text(encoding="utf-8")).values()
    return plot.sections


def _read_plots(text: str) -> dict[str, Plot]:
    """Read plots: `# name`, `key: value` lines, `## section`s, sentences between blank lines."""
    found = {}
    defaults = {"hero": "any", "friend": "any", "place": "any", "object": "any", "weather": "any"}
    defaults |= {"helper": "always", "opening": "alone", "problem": "other"}
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in block.splitlines()]
        if lines[0].startswith("# "):
            plot = Plot(lines[0][2:], defaults | dict(line.split(": ", 1) for line in lines[1:]))
            found[plot.name] = plot
        elif lines[0].startswith("## "):
            sentences = plot.sections.setdefault(lines[0][3:], [])
        else:
            sentences.append(lines)
    return found
