"""What a storyteller may be asked, with answers that are known to be right, and a judge of endings.

The words of the requests are in `data/storyworld/requests.toml`; the passages and the answers come
from the story world. Neither a wording nor a story occurs in two splits.
"""

import random
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from support.storyworld import (
    CHOICE,
    FOLDER,
    Facts,
    Story,
    ending_sentences,
    retell,
    stories,
    tell_ending,
    vocabulary,
)

TASKS = ("write", "continue", "ending", "where", "who", "what", "yes-no", "rename")
OPPOSITE = {"happy": "sad", "sad": "happy"}


@dataclass(frozen=True)
class Request:
    """What somebody asks, a right answer, and the story that it is about.

    For "write", "continue" and "ending" there are other right answers: see `passes`.
    """

    task: str
    prompt: str
    answer: str
    story: Story  # for "ending", one that ends as it should


@dataclass(frozen=True)
class Pair:
    """Two answers to a request for an ending, and which of them somebody preferred.

    `mistaken` says that it was the wrong one: see `pairs`.
    """

    prompt: str
    chosen: str
    rejected: str
    story: Story
    mistaken: bool


@cache
def wordings() -> dict[str, dict[str, list[str]]]:
    """Return `requests.toml`: for each task the wordings in each split, and the dreams."""
    return tomllib.loads((FOLDER / "requests.toml").read_text(encoding="utf-8"))


# ---- requests -----------------------------------------------------------------------------------


def requests(seed: int = 0, split: str = "train", tasks=TASKS) -> Iterator[Request]:
    """Yield requests without end, the same for the same seed; the tasks come in turn.

    Raises ValueError for an unknown task, and for an unknown split as `stories` does.
    """
    if unknown := set(tasks) - set(TASKS):
        raise ValueError(f"There is no task {min(unknown)!r}: choose {', '.join(TASKS)}.")
    rng, told = random.Random(f"requests {split} {seed}"), stories(seed, split)
    while True:
        for task in tasks:
            story = next(told)
            wanted = rng.random() < 0.5  # for "yes-no": is there a friend?
            while not _fits(task, story, wanted):
                story = next(told)
            yield ask(task, story, rng, split)


def ask(task: str, story: Story, rng: random.Random, split: str = "train") -> Request:
    """Return a request of one task about a story, in one of the split's wordings."""
    facts, (beginning, middle, end) = story.facts, _parts(story)
    place, every = vocabulary()["places"][facts.place], vocabulary()["names"]
    both = [facts.hero.name, facts.friend.name]
    name, other = rng.sample(both, 2) if task == "who" else both
    strangers = [n for n in every[facts.hero.pronoun] if n not in both]
    thing = with_article(facts.object)
    text = passage(story)
    if task == "write":
        answer = story.text
    elif task in ("continue", "ending"):
        text, answer = f"{beginning}\n\n{middle}", end
        if task == "ending":
            answer = announce(facts.ending) + end
            if rng.random() < 0.25:  # there is an end already, but not as wished
                text = retell(story, ending=OPPOSITE[facts.ending]).text
    elif task == "where":
        answer = f"It happens {place['in']}."
    elif task == "who":
        answer = f"The friend of {name} is {other}."
    elif task == "what":
        answer = f"There is {thing} in it."
    elif task == "yes-no":
        answer = "Yes." if _holds(text, *both) else "No."
    else:
        other, frame = rng.choice(strangers), rng.choice(wordings()["note"]["frames"])
        fields = {"thing": thing, "in": place["in"], "to": place["to"]}
        text, answer = (frame.format(name=who, **fields) for who in (name, other))
    fields = {"name": name, "other": other, "thing": thing, "how": facts.ending, "text": text}
    return Request(task, _wording(task, split, rng).format(**fields), answer, story)


def passage(story: Story) -> str:
    """Return the first sentences of a story: two, or more so that no quotation is cut."""
    sentences, n = re.split(r"(?<=[.!?]) ", _parts(story)[0]), 2
    while " ".join(sentences[:n]).count('"') % 2:
        n += 1
    return " ".join(sentences[:n])


def _fits(task: str, story: Story, wanted: bool) -> bool:
    """Return whether a story's passage has what a task asks about."""
    facts, text = story.facts, passage(story)
    both = facts.hero.name, facts.friend.name
    needed = {"where": (facts.place,), "who": both, "what": (facts.object,)}.get(task, ())
    return _holds(text, *needed) and (task != "yes-no" or _holds(text, *both) == wanted)


def _wording(task: str, split: str, rng: random.Random) -> str:
    """Choose a wording; in training one in three has an opening, which may stand before any."""
    found, openings = _word(wordings()[task][split], rng), wordings()["opening"][split]
    if not openings or rng.random() > 1 / 3:
        return found
    text, asked = re.fullmatch(r"({text}\n\n)?(.*)", found, re.DOTALL).groups("")
    return f"{text}{_word(openings, rng)} {asked}"


def _word(phrasings: list[str], rng: random.Random) -> str:
    """Choose a phrasing, and one of each [this|that] in it."""
    return re.sub(CHOICE, lambda m: rng.choice(m[1].split("|")), rng.choice(phrasings))


def passes(request: Request, text: str, ended: bool = True) -> bool:
    """Return whether a text does what was asked; `ended` says whether its writer stopped.

    A new story must name the hero and the object, and bring in one more name at most. An ending
    must be one of its story's endings, and the happy or the sad one if that was asked for. All
    other answers must be right letter for letter.
    """
    facts = request.story.facts
    if not ended:
        return False
    if request.task == "write":
        names = {name for group in vocabulary()["names"].values() for name in group}
        strangers = names & set(re.findall(r"\w+", text)) - {facts.hero.name}
        return _holds(text, facts.hero.name, facts.object) and len(strangers) <= 1
    if request.task == "continue":
        return judge(text, facts) != "neither"
    if request.task == "ending":
        return judge(text, facts) == facts.ending
    return text.strip() == request.answer


# ---- endings ------------------------------------------------------------------------------------


def judge(text: str, facts: Facts, known: float = 0.5, clear: float = 0.8) -> str:
    """Return whether a story's last paragraph is a "happy" or a "sad" end of it, or "neither".

    The judge knows every phrasing of the good end and of the bad one. It looks at runs of three
    words. A share of at least `known` must be familiar; and of those that occur in one kind of
    ending only, a share of at least `clear` must be of the same kind.
    """
    familiar, happy = evidence(text, facts)
    if familiar < known or 1 - clear < happy < clear:
        return "neither"
    return "happy" if happy >= clear else "sad"


def evidence(text: str, facts: Facts) -> tuple[float, float]:
    """Return which share of a text's runs of words is familiar, and how happy the telling ones are.

    1 is all happy, 0 all sad, and 0.5 is also said where no run tells.
    """
    grams = _grams(text)
    happy, sad = (heard(replace(facts, ending=ending)) for ending in ("happy", "sad"))
    familiar = sum(gram in happy or gram in sad for gram in grams)
    good = sum(gram in happy and gram not in sad for gram in grams)
    bad = sum(gram in sad and gram not in happy for gram in grams)
    return familiar / max(len(grams), 1), good / (good + bad) if good + bad else 0.5


@lru_cache(maxsize=10_000)
def heard(facts: Facts) -> frozenset[tuple[str, ...]]:
    """Return the runs of words in all phrasings of the ending that the facts name."""
    return frozenset(gram for text in ending_sentences(facts) for gram in _grams(text))


def _grams(text: str) -> list[tuple[str, ...]]:
    """Return the runs of three words in each sentence; a shorter sentence is one run."""
    sentences = (re.findall(r"[a-z']+", part) for part in re.split(r"[.!?]", text.lower()))
    return [
        tuple(words[i : i + 3])
        for words in sentences
        if words
        for i in range(max(len(words) - 2, 1))
    ]


# ---- preferences --------------------------------------------------------------------------------


def pairs(
    seed: int = 0,
    split: str = "train",
    noise: float = 0.1,
    dreams: float = 0.0,
    tasks: Sequence[str] = ("continue",),
) -> Iterator[Pair]:
    """Yield pairs of endings of the same story without end, the better one preferred.

    The happy one is, except where a sad one was asked for.

    Args:
        noise: the share of mistaken preferences.
        dreams: the share of pairs in which each answer tells both endings and says that the first
            was a dream. The two have the same words, each as often; only their order differs.
        tasks: of the requests, in turn: "continue" or "ending".
    """
    rng = random.Random(f"pairs {split} {seed}")
    for request in requests(seed, split, tasks):
        story = request.story
        wanted = story.facts.ending if request.task == "ending" else "happy"
        good, bad = (
            tell_ending(replace(story.facts, ending=ending), story.seed)
            for ending in (wanted, OPPOSITE[wanted])
        )
        if request.task == "ending":
            good, bad = announce(wanted) + good, announce(OPPOSITE[wanted]) + bad
        elif rng.random() < dreams:
            good, bad = dream(good, bad, story, rng)
        mistaken = rng.random() < noise
        chosen, rejected = (bad, good) if mistaken else (good, bad)
        yield Pair(request.prompt, chosen, rejected, story, mistaken)


def announce(ending: str) -> str:
    """Return what an answer says first, if an ending was asked for: which one is to come."""
    return f"Here is a {ending} end. "


def dream(good: str, bad: str, story: Story, rng: random.Random) -> tuple[str, str]:
    """Return two texts, each with both endings: in the first the good one is true, the last one."""
    frame, name = rng.choice(wordings()["dream"]["frames"]), story.facts.hero.name
    return tuple(frame.format(name=name, one=a, two=b) for a, b in ((bad, good), (good, bad)))


# ---- words --------------------------------------------------------------------------------------


def with_article(words: str) -> str:
    """Return "a kite", "an owl"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _parts(story: Story) -> list[str]:
    return story.text.split("\n\n")


def _holds(text: str, *words: str) -> bool:
    return set(words) <= set(re.findall(r"\w+", text))
