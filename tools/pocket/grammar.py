"""Shared by the task generators: seeded choice among phrasings, and ways to quote the subject of a question.

A template string lists alternatives separated by "|"; each may hold {slots}. One call picks one alternative, so
thirty short strings make thousands of different prompts without a grammar formalism.
"""

import random
import re
from functools import cache

from tools.pocket import words
from tools.pocket.words import CITIES, COLOURS, FIRST_NAMES, ITEMS, LAST_NAMES, NOUNS

Turn = tuple[str, str]  # role, content
Exchange = tuple[str, str]  # the user's message, the assistant's answer


@cache
def _alternatives(templates: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in templates.split("|"))


def fill(rng: random.Random, templates: str, **slots: object) -> str:
    """One of the alternatives of `templates`, its slots filled."""
    return rng.choice(_alternatives(templates)).format(**slots)


def capital(text: str) -> str:
    """The text with its first letter in upper case, the rest untouched."""
    return text[:1].upper() + text[1:]


def listed(parts: list[str]) -> str:
    """English enumeration: "a", "a and b", "a, b and c"."""
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def quoted(rng: random.Random, text: str) -> str:
    """The text bare, or in one of the usual quotes."""
    style = rng.random()
    if style < 0.5:
        return text
    if style < 0.8:
        return f'"{text}"'
    return f"'{text}'"


def asked(rng: random.Random, instruction: str, text: str) -> str:
    """An instruction and the text it is about, joined in one of the ways people use."""
    style = rng.random()
    if instruction.endswith("?"):
        return (
            f"{instruction} {text}"
            if style < 0.4
            else f"{instruction}\n{text}"
            if style < 0.7
            else f"{text}\n{instruction}"
        )
    bare = instruction.rstrip(".:")
    if style < 0.4:
        return f"{bare}: {text}"
    if style < 0.6:
        return f"{bare}:\n{text}"
    if style < 0.75:
        return f"{bare}.\n\n{text}"
    if style < 0.9:
        return f'{bare}: "{text}"'
    return f"{text}\n{instruction}"


def full_name(rng: random.Random) -> str:
    """A person's full name; one in four is made of coined words."""
    if rng.random() < 0.25:
        return f"{words.coined(rng).capitalize()} {words.coined(rng).capitalize()}"
    if rng.random() < 0.05:
        return f"{rng.choice(FIRST_NAMES)} {rng.choice('ABCDEFGHIJKLMNOPRSTW')}. {rng.choice(LAST_NAMES)}"
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def first_name(rng: random.Random) -> str:
    """A first name; one in ten is coined."""
    return words.coined(rng).capitalize() if rng.random() < 0.1 else rng.choice(FIRST_NAMES)


def city(rng: random.Random) -> str:
    """A city; one in ten is coined."""
    return words.coined(rng).capitalize() if rng.random() < 0.1 else rng.choice(CITIES)


def item(rng: random.Random) -> str:
    """A thing one can order, now and then with a colour or a coined word in front."""
    thing = rng.choice(ITEMS)
    style = rng.random()
    if style < 0.15:
        return f"{rng.choice(COLOURS)} {thing}"
    if style < 0.22:
        return f"{words.coined(rng)} {thing}"
    return thing


def word(rng: random.Random) -> str:
    """One word: a noun, an item, a name, a word of the library's documentation, or a coined one."""
    style = rng.random()
    if style < 0.35:
        return rng.choice(NOUNS)
    if style < 0.5:
        return rng.choice(ITEMS).split(" ")[-1]
    if style < 0.6:
        return rng.choice(words.ANIMALS)
    if style < 0.7:
        return rng.choice(words.ADJECTIVES)
    if style < 0.8:
        return rng.choice(FIRST_NAMES)
    if style < 0.88:
        return rng.choice(LAST_NAMES)
    return words.coined(rng)


def distinct_words(rng: random.Random, n: int) -> list[str]:
    """n different words."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[word(rng)] = None
    return list(found)


def code(rng: random.Random) -> str:
    """An identifier such as "QX-4471" or "b72k": letters and figures with no meaning."""
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    figures = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))
    text = rng.choice((f"{letters}-{figures}", f"{letters}{figures}", f"{figures}{letters}", f"#{figures}"))
    return text.lower() if rng.random() < 0.3 else text


def sentence(rng: random.Random) -> str:
    """A plain everyday sentence."""
    name, verb = first_name(rng), rng.choice(list(words.VERBS.values()))
    noun, other = rng.choice(NOUNS), rng.choice(NOUNS)
    adjective, place = rng.choice(words.ADJECTIVES), rng.choice(words.PLACES)
    text = fill(
        rng,
        """The {adj} {noun} is near the {place}.|{name} {verb} the {noun}.
        |{name} {verb} a {adj} {noun} and the {other}.|We saw the {noun} in {city}.|My {noun} is {adj}.
        |The {noun} and the {other} are {adj}.|{name} likes the {adj} {noun}.|There is a {adj} {noun} in the {place}.
        |{name} went to the {place} with {friend}.|I think the {noun} is very {adj}.|It was a {adj} day in {city}.
        |{name} and {friend} {verb} the {noun} at the {place}.|They {verb} it {adverb}.
        |The {place} in {city} has a {adj} {noun}.|In the {place} {name} {verb} {adverb}.""",
        name=name, verb=verb, noun=noun, other=other, adj=adjective, place=place, city=city(rng),
        friend=first_name(rng), adverb=rng.choice(words.ADVERBS),
    )  # fmt: skip
    return re.sub(r"\b(a) (?=[aeiou])", r"\1n ", text)
