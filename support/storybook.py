"""What is written by hand for the story world: the words, and the plots with their phrasings.

It lies in `data/storyworld`: the cast and the props in `words.toml`, and the plots, in which every
sentence has several phrasings. Its README tells how to write one.
"""

import re
import tomllib
from dataclasses import dataclass, field
from functools import cache

from support.data import DATA

FOLDER = DATA / "storyworld"


@dataclass
class Plot:
    """A story's outline: whom and what it needs, and the phrasings of every sentence."""

    name: str
    needs: dict[str, str]
    sections: dict[str, list[list[str]]] = field(default_factory=dict)


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
