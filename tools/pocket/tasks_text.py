# ruff: noqa: E501  (phrasings read best on one line)
"""Tasks on words and sentences: copy, spell, reverse, count, case, replace, sort, pick, join, quote.

Each function takes a seeded `random.Random` and returns one exchange: (user, assistant). These teach the model
to read spans and to write them again, changed or not: the skill most adapters build on.
"""

import random
import re
from collections.abc import Callable

from tools.pocket import words
from tools.pocket.grammar import (
    Exchange,
    asked,
    capital,
    code,
    distinct_words,
    fill,
    first_name,
    full_name,
    listed,
    quoted,
    sentence,
    word,
)  # fmt: skip


def copy(rng: random.Random) -> Exchange:
    """Say it again, exactly."""
    kind = rng.randrange(6)
    text = (
        word(rng),
        sentence(rng),
        code(rng),
        " ".join(distinct_words(rng, rng.randint(2, 6))),
        full_name(rng),
        f"{sentence(rng)} {sentence(rng)}",
    )[kind]
    ask = fill(
        rng,
        """Repeat|Repeat after me|Say|Copy this|Write this again|Echo this|Repeat the following text|Copy the text
        exactly|Type this again|Give this back to me unchanged""",
    )
    return asked(rng, ask.replace("\n        ", " ") + ".", text), text


def spell(rng: random.Random) -> Exchange:
    """Spell a word, letter by letter."""
    w = word(rng)
    separator, name = rng.choice((("-", "dashes"), (" ", "spaces"), (", ", "commas"), (".", "dots"), ("\n", "lines")))
    if separator == "-":
        ask = fill(rng, "Spell {w}.|How do you spell {w}?|Spell the word {w}.|Can you spell {w}?", w=quoted(rng, w))
    elif separator == "\n":
        ask = fill(rng, "Spell {w}, one letter per line.|Write each letter of {w} on its own line.", w=quoted(rng, w))
    else:
        ask = fill(
            rng,
            "Spell {w} with {n}.|Write the letters of {w} with {n} between them.|Spell out {w} using {n}.",
            w=quoted(rng, w),
            n=name,
        )
    return ask, separator.join(w)


def unspell(rng: random.Random) -> Exchange:
    """Letters to a word."""
    w = word(rng).lower()
    letters = rng.choice(("-", " ", ", ")).join(w)
    ask = "Which word is this: {x}?|Join the letters {x}.|What word do these letters spell: {x}?|Put together: {x}"
    return fill(rng, ask, x=letters), w


def reverse_word(rng: random.Random) -> Exchange:
    """A word backwards."""
    w = word(rng).lower()[:7]
    ask = "Reverse the word {w}.|Write {w} backwards.|What is {w} backwards?|Spell {w} in reverse."
    return fill(rng, ask, w=quoted(rng, w)), w[::-1]


def reverse_list(rng: random.Random) -> Exchange:
    """A list from its end."""
    ws = distinct_words(rng, rng.randint(2, 6))
    separator = rng.choice((", ", " ", "; "))
    ask = "Reverse this list|Write the words in reverse order|Turn the order around|List these from last to first"
    return asked(rng, fill(rng, ask) + ".", separator.join(ws)), separator.join(reversed(ws))


def case(rng: random.Random) -> Exchange:
    """Upper, lower, title case."""
    text = rng.choice((word, sentence, full_name))(rng)
    name, change = rng.choice(
        (("upper case|capital letters|capitals|uppercase|all caps", str.upper),
         ("lower case|small letters|lowercase", str.lower),
         ("title case", lambda s: " ".join(capital(w) for w in s.split(" "))))
    )  # fmt: skip
    ask = "Write this in {n}.|Put this in {n}.|Change to {n}.|Convert to {n}.|In {n}, please.|Make this {n}."
    return asked(rng, fill(rng, ask, n=fill(rng, name)), text), change(text)


def count_letters(rng: random.Random) -> Exchange:
    """How many letters a word has, or how often one occurs."""
    w = word(rng).lower()
    if rng.random() < 0.5:
        ask = "How many letters are in {w}?|Count the letters of {w}.|How long is the word {w}?"
        n = len(w)
        return fill(rng, ask, w=quoted(rng, w)), rng.choice((str(n), f"{n} letters"))
    letter = rng.choice(w)
    n = w.count(letter)
    ask = (
        "How many times is the letter {a} in {w}?|How often does {w} contain the letter {a}?|Count the {a}'s in {w}."
    )
    return fill(rng, ask, w=quoted(rng, w), a=letter), str(n)


def count_words(rng: random.Random) -> Exchange:
    """How many words or list members there are."""
    ws = distinct_words(rng, rng.randint(1, 9))
    if rng.random() < 0.5:
        return asked(rng, fill(rng, "How many words are there?|Count the words."), " ".join(ws)), str(len(ws))
    ask = "How many things are in this list?|Count the entries.|How many items are listed?|How long is this list?"
    return asked(rng, fill(rng, ask), ", ".join(ws)), str(len(ws))


def pick(rng: random.Random) -> Exchange:
    """First, last, n-th word or letter."""
    if rng.random() < 0.35:
        w = word(rng)
        letters, text = list(w), quoted(rng, w)
        kind = "letter"
    else:
        letters = distinct_words(rng, rng.randint(3, 7))
        text = rng.choice((", ", " ")).join(letters)
        kind = "word"
    index = rng.randrange(-1, min(5, len(letters)))
    place = "last" if index < 0 else words.ORDINALS[index + 1] if rng.random() < 0.7 else words.suffixed(index + 1)
    ask = "What is the {p} {k} of {t}?|Give me the {p} {k}: {t}|Which {k} is {p}? {t}|{t}\nWhat is the {p} {k}?"
    return fill(rng, ask, p=place, k=kind, t=text), letters[index]


def neighbour(rng: random.Random) -> Exchange:
    """The word before or after another one."""
    ws = distinct_words(rng, rng.randint(3, 8))
    i = rng.randrange(1, len(ws) - 1)
    text = rng.choice((", ", " ")).join(ws)
    after = rng.random() < 0.6
    ask = "Which word comes {p} {w}?|What comes {p} {w}?|Name the word {p} {w}."
    return asked(rng, fill(rng, ask, p="after" if after else "before", w=quoted(rng, ws[i])), text), ws[
        i + (1 if after else -1)
    ]


def replace(rng: random.Random) -> Exchange:
    """Put one word in another's place."""
    text = sentence(rng)
    old = rng.choice(re.findall(r"[A-Za-z]+", text))
    new = word(rng)
    ask = "Replace {o} with {n}.|Change {o} to {n}.|Put {n} in place of {o}.|Write {n} instead of {o}."
    answer = re.sub(rf"\b{old}\b", new, text)
    return asked(rng, fill(rng, ask, o=quoted(rng, old), n=quoted(rng, new)), text), answer


def edit_list(rng: random.Random) -> Exchange:
    """Add to or remove from a list."""
    ws = distinct_words(rng, rng.randint(3, 7))
    text = ", ".join(ws)
    if rng.random() < 0.5:
        gone = rng.choice(ws)
        ask = "Remove {w} from the list.|Delete {w}.|Take {w} out.|Leave out {w}."
        return asked(rng, fill(rng, ask, w=quoted(rng, gone)), text), ", ".join(w for w in ws if w != gone)
    new, end = word(rng), rng.random() < 0.6
    ask = "Add {w} at the {p}.|Put {w} at the {p} of the list.|Insert {w} at the {p}."
    answer = f"{text}, {new}" if end else f"{new}, {text}"
    return asked(rng, fill(rng, ask, w=quoted(rng, new), p="end" if end else "start"), text), answer


def wrap(rng: random.Random) -> Exchange:
    """Put quotes, brackets or other marks around a text, or take them off."""
    text = rng.choice((word, full_name, code, sentence))(rng)
    left, right, name = rng.choice(
        (('"', '"', "double quotes|quotes|quotation marks"), ("'", "'", "single quotes"),
         ("(", ")", "parentheses|round brackets"), ("[", "]", "square brackets|brackets"),
         ("{", "}", "curly brackets|braces"), ("<", ">", "angle brackets"), ("*", "*", "stars|asterisks"),
         ("**", "**", "two stars on each side"))
    )  # fmt: skip
    inside, outside = text, f"{left}{text}{right}"
    if rng.random() < 0.75:
        ask = "Put this in {n}.|Write it in {n}.|Put {n} around this.|Wrap the text in {n}."
        return fill(rng, "{a}: {t}|{a}\n{t}", a=fill(rng, ask, n=fill(rng, name)).rstrip("."), t=inside), outside
    return f"{fill(rng, 'Remove the {n}.|Take off the {n}.', n=fill(rng, name))}\n{outside}", inside


def join(rng: random.Random) -> Exchange:
    """Change how a list is written: commas, lines, bullets, numbers, underscores, "and"."""
    ws = distinct_words(rng, rng.randint(2, 6))
    name, write = rng.choice(
        (("a bulleted list|bullet points|a list with dashes", lambda x: "\n".join(f"- {w}" for w in x)),
         ("a numbered list|numbered lines", lambda x: "\n".join(f"{i}. {w}" for i, w in enumerate(x, 1))),
         ("separate lines|one word per line", "\n".join), ("words joined by underscores|snake case", "_".join),
         ("words joined by plus signs", " + ".join), ("words joined by slashes", "/".join),
         ("a list with semicolons", "; ".join), ("words with arrows between them", " -> ".join),
         ("words separated by vertical bars", " | ".join), ("one English enumeration|a list with 'and'", listed),
         ("a list of quoted words", lambda x: ", ".join(f'"{w}"' for w in x)),
         ("a Python list", lambda x: "[" + ", ".join(f'"{w}"' for w in x) + "]"))
    )  # fmt: skip
    source = rng.choice((", ".join, " ".join, listed, "\n".join))(ws)
    ask = "Write this as {n}.|Turn this into {n}.|Format as {n}.|Rewrite as {n}."
    return asked(rng, fill(rng, ask, n=fill(rng, name)), source), write(ws)


def sort_words(rng: random.Random) -> Exchange:
    """Alphabetical order."""
    ws = [w.lower() for w in distinct_words(rng, rng.randint(2, 6))]
    backwards = rng.random() < 0.2
    ask = "Sort these words in reverse alphabetical order.|Sort from z to a." if backwards else (
        "Sort these words.|Sort alphabetically.|Put these words in alphabetical order.|Order from a to z."
    )  # fmt: skip
    return asked(rng, fill(rng, ask), ", ".join(ws)), ", ".join(sorted(set(ws), reverse=backwards))


def longest(rng: random.Random) -> Exchange:
    """Longest or shortest of some words."""
    ws = distinct_words(rng, rng.randint(2, 5))
    name, choose = rng.choice((("longest", max), ("shortest", min)))
    lengths = [len(w) for w in ws]
    best = choose(lengths)
    if lengths.count(best) > 1:
        return longest(rng)
    ask = "Which word is the {n}?|Find the {n} word.|What is the {n} of these words?"
    return asked(rng, fill(rng, ask, n=name), ", ".join(ws)), ws[lengths.index(best)]


def contains(rng: random.Random) -> Exchange:
    """Yes-or-no questions on letters and list members."""
    ws = distinct_words(rng, rng.randint(3, 7))
    w = rng.choice(ws) if rng.random() < 0.5 else word(rng)
    if rng.random() < 0.6:
        ask = "Is {w} in this list?|Does the list contain {w}?|Can you find {w} here?"
        return asked(rng, fill(rng, ask, w=quoted(rng, w)), ", ".join(ws)), "Yes." if w in ws else "No."
    letter = rng.choice(w.lower()) if rng.random() < 0.5 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    where, test = rng.choice((("start", w.lower().startswith(letter)), ("end", w.lower().endswith(letter))))
    return fill(rng, "Does {w} {p} with {a}?|Does the word {w} {p} with the letter {a}?", w=quoted(rng, w), p=where,
                a=letter), "Yes." if test else "No."  # fmt: skip


def repeat_n(rng: random.Random) -> Exchange:
    """The same word several times."""
    w, n = word(rng), rng.randint(2, 6)
    times = rng.choice((str(n), words.number_words(n)))
    return fill(
        rng, "Write {w} {n} times.|Say {w} {n} times.|Repeat {w} {n} times.", w=quoted(rng, w), n=times
    ), " ".join([w] * n)


def few_shot(rng: random.Random) -> Exchange:
    """Find the rule from examples and apply it to a new case."""
    rule: Callable[[str], str] = rng.choice(
        (str.upper, lambda w: w[::-1], lambda w: w[0], lambda w: w[-1], lambda w: f"{w} {w}", lambda w: f"<{w}>",
         lambda w: "-".join(w), lambda w: f"my {w}", words.plural, lambda w: f"{w}!", capital, lambda w: f'"{w}"',
         lambda w: f"the {w}", words.article, lambda w: f"[{w}]", lambda w: f"{w}, please", lambda w: f"{w}={w}")
    )  # fmt: skip
    ws = [rng.choice(words.NOUNS) if rng.random() < 0.8 else words.coined(rng) for _ in range(rng.randint(3, 5))]
    arrow, line = rng.choice((" -> ", ": ", " = ", " => ")), rng.choice(("\n", "\n", "; "))
    shown = line.join(f"{w}{arrow}{rule(w)}" for w in ws[:-1])
    head = fill(rng, "|Go on in the same way:|Complete the last line.|Follow the pattern:|Examples:")
    return f"{head}\n{shown}{line}{ws[-1]}{arrow.rstrip()}".strip(), rule(ws[-1])


def pattern(rng: random.Random) -> Exchange:
    """The next member of a repeating row."""
    ws = distinct_words(rng, rng.randint(2, 3))
    length = rng.randint(4, 9)
    row = [ws[i % len(ws)] for i in range(length + 1)]
    ask = "What comes next?|Continue the pattern with one word.|Which word follows?"
    return asked(rng, fill(rng, ask), rng.choice((" ", ", ")).join(row[:-1])), row[-1]


def number_of_noun(rng: random.Random) -> Exchange:
    """Singular to plural and back."""
    noun = rng.choice(words.ITEMS) if rng.random() < 0.7 else rng.choice(words.NOUNS + words.ANIMALS)
    if rng.random() < 0.12:
        noun = words.coined(rng)
    many = words.plural(noun)
    if rng.random() < 0.35:
        ask = "What is the plural of {w}?|Plural of {w}?|One {w}, two ...?|Make {w} plural.|More than one {w}:"
        return fill(rng, ask, w=quoted(rng, noun)), many
    ask = "What is the singular of {w}?|Singular of {w}?|Two {w}, one ...?|Write {w} in the singular.|Only one of the {w}:"
    return fill(rng, ask, w=quoted(rng, many)), noun


def initials(rng: random.Random) -> Exchange:
    """Initials, first and last names, and swapping them."""
    name = full_name(rng)
    first, last = name.split(" ")[0], name.split(" ")[-1]
    ask, answer = rng.choice(
        (("What are the initials of {n}?|Initials of {n}?", f"{first[0]}.{last[0]}."),
         ("Write {n} with the last name first.|Put the family name first: {n}", f"{last}, {first}"),
         ("What is the first name of {n}?|First name only: {n}", first),
         ("What is the last name of {n}?|Family name only: {n}", last),
         ("Shorten the first name: {n}", f"{first[0]}. {last}"))
    )  # fmt: skip
    return fill(rng, ask, n=name), answer


def clean(rng: random.Random) -> Exchange:
    """Take out or put in punctuation and spaces."""
    text = sentence(rng)
    ask, answer = rng.choice(
        (("Remove the spaces.|Take out all spaces.", text.replace(" ", "")),
         ("Remove the full stop.|Delete the period at the end.", text.rstrip(".")),
         ("Replace the spaces with underscores.|Put underscores between the words.", text.replace(" ", "_")),
         ("End it with an exclamation mark.|Make it an exclamation.", text.rstrip(".") + "!"),
         ("Put a comma after each word.", ", ".join(text.rstrip(".").split(" ")) + "."))
    )  # fmt: skip
    return asked(rng, fill(rng, ask), text), answer


def first_words(rng: random.Random) -> Exchange:
    """The first or last n words of a sentence."""
    ws = sentence(rng).rstrip(".").split(" ")
    n = rng.randint(1, min(4, len(ws)))
    if rng.random() < 0.6:
        place, part = "first", ws[:n]
    else:
        place, part = "last", ws[-n:]
    count = words.number_words(n)
    unit = "word" if n == 1 else "words"
    ask = "Give me the {p} {n} {u}.|Write only the {p} {n} {u}.|Only the {p} {n} {u}, please."
    return asked(rng, fill(rng, ask, p=place, n=count, u=unit), " ".join(ws) + "."), " ".join(part)


def who_is_missing(rng: random.Random) -> Exchange:
    """The one name that one list has and the other has not."""
    names = list({first_name(rng): None for _ in range(6)})[:4]
    gone = rng.choice(names)
    rest = [n for n in names if n != gone]
    rng.shuffle(rest)
    ask = "First list: {a}. Second list: {b}. Who is missing in the second?|{a} came. {b} left. Who is still here?"
    return fill(rng, ask, a=", ".join(names), b=", ".join(rest)), gone


TASKS: dict[Callable[[random.Random], Exchange], float] = {
    copy: 3, spell: 1.5, unspell: 1, reverse_word: 0.8, reverse_list: 1, case: 2, count_letters: 0.8, count_words: 0.8,
    pick: 1.5, neighbour: 1, replace: 1.5, edit_list: 1.2, wrap: 2, join: 2.5, sort_words: 0.8, longest: 0.4,
    contains: 0.7, repeat_n: 0.5, few_shot: 3, pattern: 0.6, number_of_noun: 3, initials: 1.2, clean: 1,
    first_words: 1, who_is_missing: 0.4,
}  # fmt: skip
