# ruff: noqa: E501  (phrasings read best on one line)
"""Tasks on a small closed world: capitals, animals, colours, opposites, jobs, uses, grammar, Python one-liners.

The model can know only the facts in `words.py`. Questions just outside of them are answered with "I do not know", so
that the model learns the limits of its knowledge.
"""

import random
from collections.abc import Callable

from tools.pocket import words
from tools.pocket.grammar import Exchange, asked, capital, fill, first_name, item, listed, word


def capital_city(rng: random.Random) -> Exchange:
    """Capitals of countries and back; coined countries are unknown."""
    if rng.random() < 0.08:
        land = words.coined(rng).capitalize()
        return fill(
            rng, "What is the capital of {c}?|Which city is the capital of {c}?", c=land
        ), "I do not know that country."
    land, town = rng.choice(list(words.CAPITALS.items()))
    if rng.random() < 0.3:
        return fill(rng, "{t} is the capital of which country?|Which country has the capital {t}?", t=town), capital(
            land
        )
    answer = rng.choice((town, f"The capital of {land} is {town}.", f"{town}."))
    return fill(
        rng,
        "What is the capital of {c}?|Which city is the capital of {c}?|Capital of {c}?|Name the capital of {c}.",
        c=land,
    ), answer


def opposite(rng: random.Random) -> Exchange:
    """Opposites."""
    a, b = rng.choice(list(words.OPPOSITES.items()))
    if rng.random() < 0.4 and list(words.OPPOSITES.values()).count(b) == 1:
        a, b = b, a
    return fill(
        rng, "What is the opposite of {a}?|Opposite of {a}?|The opposite of {a} is ...|Name the opposite: {a}", a=a
    ), b


def animal(rng: random.Random) -> Exchange:
    """Sounds, young ones, legs."""
    style = rng.randrange(3)
    if style == 0:
        a, sound = rng.choice(list(words.SOUNDS.items()))
        return fill(rng, "What sound does {a} make?|What does {a} say?", a=words.article(a)), capital(sound) + "!"
    if style == 1:
        a, child = rng.choice(list(words.YOUNG.items()))
        return fill(
            rng, "What is a young {a} called?|What do you call a baby {a}?", a=a
        ), f"{capital(words.article(child))}."
    a, n = rng.choice(list(words.LEGS.items()))
    return fill(rng, "How many legs does {a} have?|Number of legs of {a}?", a=words.article(a)), str(n)


def colour_of(rng: random.Random) -> Exchange:
    """Colours of things."""
    thing, colour = rng.choice(list(words.THING_COLOURS.items()))
    if rng.random() < 0.25:
        same = [t for t, c in words.THING_COLOURS.items() if c == colour]
        return fill(rng, "Name something {c}.|What is {c}?|Tell me a thing that is {c}.", c=colour), capital(
            f"{rng.choice(same)}."
        )
    return fill(rng, "What colour is {t}?|Which colour does {t} have?|Colour of {t}?", t=thing), capital(f"{colour}.")


def job(rng: random.Random) -> Exchange:
    """Tasks of a job, and the job that does a task."""
    name, work = rng.choice(list(words.JOB_WORK.items()))
    if rng.random() < 0.4:
        return f"Who {work}?", f"{capital(words.article(name))}."
    return fill(
        rng, "What does {a} do?|What is the work of {a}?", a=words.article(name)
    ), f"{capital(words.article(name))} {work}."


def use(rng: random.Random) -> Exchange:
    """Purposes of things, and the thing for a purpose."""
    thing, what = rng.choice(list(words.USES.items()))
    if rng.random() < 0.5:
        return fill(
            rng, "What do I need to {w}?|What can I use to {w}?|Which thing helps me to {w}?", w=what
        ), f"You can use {words.article(thing)}."
    return fill(
        rng, "What is {a} for?|What do you do with {a}?|Why do people have {a}?", a=words.article(thing)
    ), f"With {words.article(thing)} you can {what}."


def continent(rng: random.Random) -> Exchange:
    """The continent of a country."""
    name, lands = rng.choice(list(words.CONTINENTS.items()))
    land = rng.choice(lands)
    return fill(
        rng, "On which continent is {c}?|Which continent is {c} on?|Where in the world is {c}?", c=land
    ), f"{land} is in {name}."


def category(rng: random.Random) -> Exchange:
    """The kind of a thing; examples of a kind."""
    kind = rng.choice(list(words.CATEGORIES))
    members = words.CATEGORIES[kind]
    style = rng.random()
    if style < 0.4:
        return fill(rng, "What is {w}?|What kind of thing is {w}?|Is {w} an animal, a fruit, a job or something else?",
                    w=words.article(rng.choice(members))), f"It is {words.article(kind)}."  # fmt: skip
    if style < 0.7:
        n = rng.randint(1, 5)
        shown = kind if n == 1 else words.plural(kind)
        picked = rng.sample(members, n)
        ask = "Name {n} {k}.|List {n} {k}.|Tell me {n} {k}.|Give me {n} {k}, please."
        return fill(rng, ask, n=rng.choice((n, words.number_words(n))), k=shown), capital(listed(picked)) + "."
    w = rng.choice(members if rng.random() < 0.5 else words.CATEGORIES[rng.choice(list(words.CATEGORIES))])
    yes = w in members
    return f"Is {words.article(w)} {words.article(kind)}?", f"Yes, {words.article(w)} is {words.article(kind)}." if yes else (
        f"No, {words.article(w)} is not {words.article(kind)}.")  # fmt: skip


def tense(rng: random.Random) -> Exchange:
    """Present and past of verbs and short sentences."""
    now, past = rng.choice(list(words.VERBS.items()))
    style = rng.randrange(4)
    if style == 0:
        return fill(
            rng, "What is the past tense of {v}?|Past tense of {v}?|Today I {v}, yesterday I ...", v=now
        ), past
    if style == 1:
        return fill(rng, "What is the present tense of {v}?|Base form of {v}?", v=past), now
    who, what = rng.choice(("I", "We", "They", "You")), rng.choice(words.NOUNS)
    a, b = f"{who} {now} the {what}.", f"{who} {past} the {what}."
    if style == 2:
        return asked(rng, fill(rng, "Put this in the past tense.|Write it in the past."), a), b
    return asked(rng, fill(rng, "Put this in the present tense.|Write it in the present."), b), a


def negate(rng: random.Random) -> Exchange:
    """Say that it is not so; turn a statement into a question."""
    subject = rng.choice((first_name(rng), f"The {rng.choice(words.NOUNS)}", f"The {item(rng)}"))
    adjective = rng.choice(words.ADJECTIVES)
    if rng.random() < 0.5:
        ask = "Say the opposite with 'not'.|Negate this.|Make it negative."
        return asked(rng, fill(rng, ask), f"{subject} is {adjective}."), f"{subject} is not {adjective}."
    lowered = subject[0].lower() + subject[1:] if subject.startswith("The ") else subject
    return asked(
        rng, fill(rng, "Turn this into a question.|Make it a question."), f"{subject} is {adjective}."
    ), f"Is {lowered} {adjective}?"


def article_of(rng: random.Random) -> Exchange:
    """A or an."""
    w = rng.choice(words.NOUNS + words.FRUITS + words.JOBS)
    return fill(rng, "Put a or an before {w}.|A or an: {w}?|Which article, a or an, for {w}?", w=w), words.article(w)


def python(rng: random.Random) -> Exchange:
    """Small pieces of Python."""
    a, b = rng.randint(0, 20), rng.randint(1, 20)
    name, w = rng.choice(("x", "n", "total", "value", "count", "size")), word(rng).lower()
    ask, answer = rng.choice(
        (("Write Python that prints {w}.|How do I print {w} in Python?", 'print("{w}")'),
         ("Set {n} to {a} in Python.|Python: give {n} the value {a}.", "{n} = {a}"),
         ("Python: add {a} to {n}.|How do I add {a} to {n} in Python?", "{n} += {a}"),
         ("Write a Python loop that counts from 0 to {b}, without {b}.", "for i in range({b}):\n    print(i)"),
         ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b"),
         ("Write a Python function named {n} that returns {a}.", "def {n}():\n    return {a}"),
         ("Python: make a list with {a} and {b}.", "[{a}, {b}]"), ("How do I get the length of {n} in Python?", "len({n})"),
         ("Python: check whether {n} is larger than {b}.", "if {n} > {b}:\n    print(\"yes\")"),
         ("How do I import {n} in Python?", "import {n}"), ("Python: turn the text {n} into a number.", "int({n})"),
         ("Write a Python function that says hello to a name.", 'def hello(name):\n    print("Hello, " + name + "!")'),
         ("Python: make {n} upper case.", "{n} = {n}.upper()"), ("Python: sort the list {n}.", "{n}.sort()"))
    )  # fmt: skip
    slots = {"n": name, "w": w, "a": a, "b": b}
    return fill(rng, ask, **slots), answer.format(**slots)


def explain(rng: random.Random) -> Exchange:
    """One-sentence definitions of things in the small world."""
    kind = rng.choice(("animal", "fruit", "vegetable", "job", "sport", "drink"))
    w = rng.choice(words.CATEGORIES[kind])
    shown = w if kind in ("sport", "drink") else words.article(w)
    if kind == "job":
        text = (
            f"{capital(words.article(w))} {words.JOB_WORK[w]}."
            if w in words.JOB_WORK
            else f"{capital(shown)} is a person with a job."
        )
    else:
        text = f"{capital(shown)} is {words.article(kind)}."
        if w in words.THING_COLOURS:
            text += f" It is {words.THING_COLOURS[w]}."
        if w in words.LEGS:
            text += f" It has {words.number_words(words.LEGS[w])} legs."
        if w in words.SOUNDS:
            text += f" It says {words.SOUNDS[w]}."
    return fill(
        rng, "Explain what {w} is.|Tell me about {w}.|Describe {w}.|What can you say about {w}?", w=shown
    ), text


TASKS: dict[Callable[[random.Random], Exchange], float] = {
    capital_city: 1.5, opposite: 1, animal: 1, colour_of: 0.7, job: 0.7, use: 0.8, continent: 0.4, category: 1.2,
    tense: 1, negate: 0.7, article_of: 0.3, python: 0.8, explain: 0.8,
}  # fmt: skip
