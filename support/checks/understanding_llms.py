"""The exercises of chapter 1, understanding large language models."""

import math
from collections import Counter

from support.checks import Exercise


def _words(text):
    return text.split()


ROMEO = _words("Romeo loves Juliet and Romeo")
RHYME = _words("a b a c a b a")
KING = _words("the king is here the queen is gone the king is dead long live the king")
BANQUO = _words("lesser than Macbeth and greater not so happy yet much happier than he")


# 1.1


def _next_shares(words, word):
    followers = Counter(b for a, b in zip(words, words[1:], strict=False) if a == word)
    return {follower: times / followers.total() for follower, times in followers.items()}


def _next_counts(words, word):
    return dict(Counter(b for a, b in zip(words, words[1:], strict=False) if a == word))


def _divided_by(denominator):
    def wrong(words, word):
        counts = _next_counts(words, word)
        return {w: times / denominator(words, word) for w, times in counts.items()}

    return wrong


next_shares = Exercise(
    "1.1",
    _next_shares,
    [(RHYME, "a"), (KING, "is"), (KING, "king"), (KING, "the"), (RHYME, "x"), (ROMEO, "Romeo")],
    [
        (_next_counts, "These are counts; divide each by their sum to get shares."),
        (
            _divided_by(lambda words, word: words.count(word)),
            "If the text ends with the word, that last one has no follower: divide by the number "
            "of followers.",
        ),
        (
            _divided_by(lambda words, word: len(words)),
            "Divide by the number of followers of this word, not by the length of the text.",
        ),
        (
            lambda words, word: _next_shares(words[::-1], word),
            "You look at the words before it; the exercise asks for those after it.",
        ),
        (
            lambda words, word: {
                w: 1 / len(_next_counts(words, word)) for w in _next_counts(words, word)
            },
            "A word that came twice has twice the share of one that came once: count each time.",
        ),
        (
            lambda words, word: {w: 100 * p for w, p in _next_shares(words, word).items()},
            "These are percentages; a share is a number from 0 to 1.",
        ),
        (
            lambda words, word: {w: round(p, 2) for w, p in _next_shares(words, word).items()},
            "Do not round: the shares must add up to 1.",
        ),
        (
            lambda words, word: dict.fromkeys(words, 0.0) | _next_shares(words, word),
            "Leave out the words that never came after it.",
        ),
        (
            lambda words, word: _next_shares(words[:-1], word),
            "The last pair of neighbors is missing: there are len(words) − 1 of them.",
        ),
        (
            lambda words, word: _next_shares(words[1:], word),
            "The first pair of neighbors is missing: begin at place 0.",
        ),
    ],
)


# 1.2


def _perplexity_of(probabilities):
    if 0 in probabilities:
        return math.inf
    return 2 ** (sum(-math.log2(p) for p in probabilities) / len(probabilities))


def _only_if_possible(value):
    return lambda probabilities: math.inf if 0 in probabilities else value(probabilities)


perplexity_of = Exercise(
    "1.2",
    _perplexity_of,
    [
        ([0.5, 0.125],),
        ([0.25],),
        ([0.9, 0.2, 0.01],),
        ([1.0, 1.0],),
        ([0.5, 0.0],),
        ([0.0, 0.5],),
    ],
    [
        (
            _only_if_possible(lambda ps: sum(-math.log2(p) for p in ps) / len(ps)),
            "This is the mean surprise in bits; raise 2 to this power.",
        ),
        (
            _only_if_possible(lambda ps: 2 ** sum(-math.log2(p) for p in ps)),
            "You use the sum of the surprises; take their mean.",
        ),
        (
            _only_if_possible(lambda ps: len(ps) / sum(ps)),
            "You average the probabilities; average their surprises, −log₂ p.",
        ),
        (
            _only_if_possible(lambda ps: 2 ** (sum(map(math.log2, ps)) / len(ps))),
            "The sign is missing: the surprise is −log₂ p, and a perplexity is never below 1.",
        ),
        (
            _only_if_possible(lambda ps: 2 ** (sum(-math.log(p) for p in ps) / len(ps))),
            "You mix two bases: with math.log use math.exp, with 2 ** use math.log2.",
        ),
        (
            _only_if_possible(lambda ps: math.exp(sum(-math.log2(p) for p in ps) / len(ps))),
            "You mix two bases: with math.log2 use 2 **, with math.exp use math.log.",
        ),
        (
            _only_if_possible(lambda ps: 2 ** sum(-p * math.log2(p) for p in ps)),
            "Each word counts the same: do not multiply its surprise by p.",
        ),
        (
            lambda ps: _perplexity_of([p for p in ps if p > 0]),
            "A word with probability 0 may not be skipped: the perplexity is then infinite.",
        ),
    ],
)


# 1.3


def _grams(words, n):
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _share(known, asked):
    found = [gram in known for gram in asked]
    return sum(found) / len(found) if found else 0.0


def _seen_share(known, words, n):
    return _share(set(_grams(known, n)), _grams(words, n))


def _found_in_text(space):
    return lambda known, words, n: _share(space.join(known), map(space.join, _grams(words, n)))


def _without_case(known, words, n):
    return _seen_share([w.lower() for w in known], [w.lower() for w in words], n)


seen_share = Exercise(
    "1.3",
    _seen_share,
    [
        (KING, _words("long live the queen the king is gone"), 2),
        (RHYME, _words("a b a b a b c"), 3),
        (KING, _words("the king is dead long live the king"), 4),
        (KING, _words("the king is dead and the king is gone and the king is here"), 2),
        (KING, ["the"], 2),
        (BANQUO, ["great", "happy", "an"], 1),
        (["b", "c"], ["a", "b", "c"], 2),
        (["ab", "c"], ["a", "bc"], 2),
        (KING, _words("The king is dead"), 2),
        (KING, ["the", "king"], 2),
    ],
    [
        (
            lambda known, words, n: 1 - _seen_share(known, words, n) if len(words) >= n else 0.0,
            "This is the share that is new; the exercise asks for the share that is known.",
        ),
        (
            lambda known, words, n: _share(set(_grams(known, n)), list(set(_grams(words, n)))),
            "Each place in the text counts: an n-gram that comes twice is counted twice.",
        ),
        (
            lambda known, words, n: _share(set(_grams(known, n)), _grams(words, n)[:-1]),
            "The last n-gram is missing: there are len(words) − n + 1 of them.",
        ),
        (
            lambda known, words, n: _seen_share(words, known, n),
            "You ask it the other way round: which share of `words` stands in `known`?",
        ),
        (
            lambda known, words, n: (
                sum(g in set(_grams(known, n)) for g in _grams(words, n)) / len(words)
            ),
            "Divide by the number of n-grams, which is smaller than the number of words.",
        ),
        (
            lambda known, words, n: _seen_share(known, words, 1) if len(words) >= n else 0.0,
            "The n words must stand together and in the same order, not only somewhere.",
        ),
        (
            lambda known, words, n: _seen_share(known, words, n) if len(words) > n else 0.0,
            "A text of exactly n words has one n-gram.",
        ),
        *(
            (
                _found_in_text(space),
                "Compare whole words: “great” is a part of “greater”, but another word.",
            )
            for space in (" ", "")
        ),
        (_without_case, "Compare the words as they are: “The” is not “the”."),
        (
            lambda known, words, n: 100 * _seen_share(known, words, n),
            "This is a percentage; a share is a number from 0 to 1.",
        ),
    ],
)


# 1.4


def _gap(words, before, after):
    threes = zip(words, words[1:], words[2:], strict=False)
    return Counter(b for a, b, c in threes if (a, c) == (before, after))


def _after(words, before):
    return Counter(b for a, b in zip(words, words[1:], strict=False) if a == before)


def _first_best(counter):
    return min(counter, key=lambda word: (-counter[word], word), default="")


def _fill_gap(words, before, after):
    return _first_best(_gap(words, before, after) or _after(words, before))


def _found_first(words, before, after):
    counter = _gap(words, before, after) or _after(words, before)
    return max(counter, key=counter.get, default="")


def _last_on_ties(words, before, after):
    counter = _gap(words, before, after) or _after(words, before)
    return max(counter, key=lambda word: (counter[word], word), default="")


def _no_fallback(words, before, after):
    return _first_best(_gap(words, before, after))


def _ignores_right(words, before, after):
    return _first_best(_after(words, before))


def _falls_back_right(words, before, after):
    return _first_best(_gap(words, before, after) or _after(words[::-1], after))


def _of_both(words, before, after):
    return _first_best(_gap(words, before, after) + _after(words, before))


def _alphabetical(words, before, after):
    return min(_gap(words, before, after) or _after(words, before), default="")


CATS = _words("a red cat a red hat a big cat the old cat a old hat a big hat the zoo")
DUKES = _words("my lord the duke my good duke my lord a king my good king my lord")

FOUL = _words("so fair and so foul so foul so foul")

fill_gap = Exercise(
    "1.4",
    _fill_gap,
    [
        (CATS, "a", "hat"),
        (CATS, "a", "cat"),
        (CATS, "the", "cat"),
        (CATS, "the", "hat"),
        (DUKES, "my", "duke"),
        (DUKES, "my", "queen"),
        (DUKES, "your", "duke"),
        (DUKES, "your", "queen"),
        (FOUL, "so", "and"),
        (FOUL[3:] + FOUL[:3], "so", "and"),
        (FOUL[1:], "fair", "foul"),
        (_words("so foul so fair"), "so", "and"),
        (_words("so foul so fair"), "fair", "so"),
        (_words("a red hat a big hat red red"), "a", "hat"),
        (_words("The bad king the good king"), "the", "king"),
    ],
    [
        (
            _ignores_right,
            "You look at the left side only; the word after the gap matters, too.",
        ),
        (
            _no_fallback,
            "If the two never stood around one word, fall back on what came after `before`.",
        ),
        (
            _falls_back_right,
            "The fallback uses the word before the gap, not the word after it.",
        ),
        (
            _found_first,
            "Among equally frequent words the alphabetically first wins, not the first found.",
        ),
        (
            _last_on_ties,
            "Among equally frequent words the alphabetically first wins, not the last.",
        ),
        (
            _of_both,
            "What came after `before` counts only if the two never stood around a word.",
        ),
        (
            _alphabetical,
            "The most frequent word wins; the alphabet decides only between equals.",
        ),
        (
            lambda words, before, after: _fill_gap(words[1:], before, after),
            "The first group of three neighbors is missing: begin at place 0.",
        ),
        (
            lambda words, before, after: _fill_gap(words[:-1], before, after),
            "The last group of three neighbors is missing: there are len(words) − 2 of them.",
        ),
    ],
)


# 1.5


def _induction(words):
    for i in range(len(words) - 2, -1, -1):
        if words[i] == words[-1]:
            return words[i + 1]
    return ""


def _earliest(words):
    return next((b for a, b in zip(words, words[1:], strict=False) if a == words[-1]), "")


def _word_before(words):
    for i in range(len(words) - 2, 0, -1):
        if words[i] == words[-1]:
            return words[i - 1]
    return ""


def _most_frequent(words):
    followers = _after(words, words[-1])
    return max(followers, key=followers.get, default="")


def _not_beside(words):
    found = [b for a, b in zip(words[:-2], words[1:], strict=False) if a == words[-1]]
    return found[-1] if found else ""


def _part_of_word(words):
    found = [b for a, b in zip(words, words[1:], strict=False) if words[-1] in a]
    return found[-1] if found else ""


def _case_blind(words):
    return _induction([word.lower() for word in words])


induction = Exercise(
    "1.5",
    _induction,
    [
        (ROMEO,),
        (_words("to be or not to do and to"),),
        (_words("a c a b x a b a d a"),),
        (_words("never never never"),),
        (_words("The end of the story The"),),
        (_words("alone"),),
        (_words("all is new"),),
        (_words("so it was sore indeed so"),),
        (_words("ha said he ha ha"),),
        (_words("x a x b x c x d x e x f x"),),
    ],
    [
        (_earliest, "You take the first place where the word stood; take the most recent one."),
        (_word_before, "You give the word before that place; give the one that followed it."),
        (_most_frequent, "You take the most frequent follower; take the most recent one."),
        (
            lambda words: words[-1] if words[-1] in words[:-1] else "",
            "You give the word itself; give the one that followed it at the earlier place.",
        ),
        (
            lambda words: _earliest(words[-2::-1] + words[-1:]),
            "You search backward, and then give the word before that place; give the next one.",
        ),
        (_not_beside, "The word right before the last one may be the place, too."),
        (
            _part_of_word,
            "Compare whole words, with ==: “so” is a part of “sore”, but not the same.",
        ),
        (_case_blind, "Compare and return the words as they are: “The” is not “the”."),
    ],
)


# 1.6


def _token_accuracy_for(target, k):
    return target ** (1 / k)


token_accuracy_for = Exercise(
    "1.6",
    _token_accuracy_for,
    [(0.25, 2), (0.5, 1), (0.9, 30), (0.5, 300), (0.001, 3)],
    [
        (lambda target, k: target**k, "This solves the task from p; here p is what you look for."),
        (
            lambda target, k: target / k,
            "Probabilities multiply, so take a root; and in `x ** 1 / k` the power comes first.",
        ),
        (
            lambda target, k: 1 - (1 - target) / k,
            "The errors do not add up exactly: solve p to the power of k = target.",
        ),
        (
            lambda target, k: target ** (1 // k),
            "1 // k is a whole number, mostly 0; you need the fraction 1 / k.",
        ),
        (
            lambda target, k: math.log(target) / k,
            "This is the logarithm of p; math.exp takes you back from it.",
        ),
        (
            lambda target, k: 1 - target ** (1 / k),
            "This is the share of wrong tokens; the exercise asks for that of the right ones.",
        ),
        (
            lambda target, k: 1 - (1 - target) ** (1 / k),
            "With this p at least one of the k tokens is right; all of them must be.",
        ),
        (lambda target, k: math.sqrt(target), "Take the k-th root; k is not always 2."),
        (lambda target, k: round(target ** (1 / k), 2), "Do not round: with k = 30 it matters."),
    ],
)
