# ruff: noqa: E501  (phrasings read best on one line)
"""Tasks on short texts: find a name, number, city or day; answer from a passage; fill a form; look up a table.

Messages about people, places, things and days are written from hidden fields, then asked about. Answers come as
plain words, "key: value" lines, or in a form spelled out in the prompt; never as a JSON object, which is the
demo's skill to learn.
"""

import random
from collections.abc import Callable

from tools.pocket import words
from tools.pocket.grammar import (
    Exchange,
    asked,
    capital,
    city,
    code,
    fill,
    first_name,
    full_name,
    item,
    listed,
    word,
)

_MESSAGES = """
{name} from {city} bought {things} on {day}.|{name} will bring {things} to {city} on {day}.|On {day} {name} travels to {city}
with {things}.|In {city} {name} found {things} last {day}.|{name} sold {things} in {city}, and that was on {day}.|{things} went to
{name} in {city} on {day}.|{day}: {name} picks up {things} in {city}.|{name} lives in {city} and needs {things} before {day}.|I met
{name} in {city} on {day}; we looked at {things}.|The shop in {city} promised {name} {things} for {day}.|This is {name}. On {day} I
lost {things} in {city}.|{name} hopes to get {things} by {day}, when the fair in {city} opens.|A parcel with {things} left {city} on
{day}. It is for {name}.|{name}, who works in {city}, asked for {things} until {day}.|Could you tell {name} that {things} will be
in {city} on {day}?|{city} is lovely, says {name}, who saw {things} there on {day}.|My friend {name} has {things} in {city}. We meet on {day}.
|Every {day} {name} takes {things} to the market in {city}.|Note for {day}: {things}, {name}, {city}.|{name} ({city}): {things}, {day}
"""
_FIELDS = {
    "name": "Who is it?|What is the name?|Name the person.|Who is meant?|Which person is named?",
    "city": "Which city is it?|What is the city?|Name the city.|Where is it?|Which place is named?",
    "day": "Which day is it?|What is the day?|On which day?|When is it?|Name the day.",
    "item": "What thing is it, in the singular?|Name the thing in the singular.|Which item, in the singular?",
    "count": "How many, as a number?|What is the number, in figures?|How many are there?|Give the count in digits.",
    "things": "What is it?|What things are named?|Which things, and how many?",
}
# The same fields as loose clauses in any order, so that no sentence pattern can be learned by heart
_CLAUSES = {
    "name": "for {name}|{name}|to {name}|customer {name}|ask for {name}|the name is {name}|{name} says|from {name}",
    "city": "in {city}|to {city}|{city}|from {city}|place: {city}|near {city}|our {city} office|at home in {city}",
    "day": "on {day}|by {day}|next {day}|until {day}|{day}|before {day}|due {day}|this {day}|not later than {day}",
    "things": "{things}|needs {things}|sends {things}|please bring {things}|we want {things}|there are {things}|takes {things}",
}
_AROUND = """Hello.|Thanks!|It is urgent.|Please hurry.|See you soon.|This is important.|Good morning.|Let me know.|Call me back.
|No rush.|That is all.|As always."""
_SYNONYMS = {
    "name": "name person customer who", "city": "city town place where", "day": "day weekday when date",
    "item": "item product thing what", "count": "count number quantity amount",
}  # fmt: skip


def _sentence_of(rng: random.Random, fields: dict[str, str]) -> str:
    if rng.random() < 0.65:
        text = capital(fill(rng, _MESSAGES, **fields).replace("\n", " "))
    else:
        clauses = [fill(rng, _CLAUSES[key], **fields) for key in rng.sample(list(_CLAUSES), 4)]
        text = capital(rng.choice((", ", " ", ", ", "; ")).join(clauses)) + rng.choice((".", ".", "!", ""))
    style = rng.random()
    if style < 0.1:
        return f"{fill(rng, _AROUND)} {text}"
    if style < 0.2:
        return f"{text} {fill(rng, _AROUND)}".replace("\n", " ")
    return text


def message(rng: random.Random) -> tuple[str, dict[str, str]]:
    """A sentence about a person, things, a city and a day, and the fields of which it was made."""
    thing = item(rng)
    count = rng.choice((1, rng.randint(2, 20), rng.randint(2, 99)))
    figure = words.number_words(count) if rng.random() < 0.5 else str(count)
    if count == 1:
        things = rng.choice((f"one {thing}", words.article(thing)))
    elif rng.random() < 0.05:
        count, things = 12, f"a dozen {words.plural(thing)}"
    else:
        things = f"{figure} {words.plural(thing)}"
    fields = {"name": full_name(rng), "city": city(rng), "day": rng.choice(words.DAYS), "item": thing,
              "count": str(count), "things": things}  # fmt: skip
    if rng.random() < 0.3:
        fields["name"] = fields["name"].split(" ")[0]
    return _sentence_of(rng, fields), fields


def extract(rng: random.Random) -> Exchange:
    """One field of a message."""
    text, fields = message(rng)
    key = rng.choice(list(_FIELDS))
    style = rng.random()
    if style < 0.6:
        ask = fill(rng, _FIELDS[key])
    else:
        ask = fill(
            rng, "Find the {k}.|Give me only the {k}.|Extract the {k}.|{k}?|Read the text and tell me the {k}.", k=key
        )
    return asked(rng, ask, text), fields[key]


def form(rng: random.Random) -> Exchange:
    """Several fields of a message, in the form and order that the prompt asks for."""
    text, fields = message(rng)
    keys = rng.sample(["name", "city", "day", "item", "count"], rng.randint(2, 5))
    title = rng.random() < 0.4
    names = [rng.choice(_SYNONYMS[k].split(" ")) if rng.random() < 0.25 else k for k in keys]
    shown = [capital(k) if title else k for k in names]
    values = [fields[k] for k in keys]
    style = rng.randrange(7)
    if style <= 2:
        answer = "\n".join(f"{k}: {v}" for k, v in zip(shown, values, strict=True))
        form_name = "one 'key: value' line for each|lines with key and value|a little form"
        ask = fill(rng, "Write {k} as {f}.|Give {k} as {f}.", k=listed(shown), f=fill(rng, form_name))
    elif style == 3:
        answer = "; ".join(f"{k}={v}" for k, v in zip(shown, values, strict=True))
        ask = fill(rng, "Fill in: {t}|Complete the form {t}", t="; ".join(f"{k}=" for k in shown))
    elif style == 4:
        separator = rng.choice((" | ", "; ", ", ", " / ", " - "))
        answer = separator.join(values)
        ask = fill(rng, "Write it as: {t}|Use this form: {t}", t=separator.join(f"<{k}>" for k in shown))
    elif style == 5:
        answer = ", ".join(f'"{v}"' for v in values)
        ask = fill(rng, "Quote {k}.|Give {k} in double quotes with commas between them.", k=listed(shown))
    else:
        answer = "\n".join(values)
        ask = fill(rng, "List {k}, one per line.|Only {k}, each on a line.", k=listed(shown))
    return asked(rng, ask, text), answer


def acknowledge(rng: random.Random) -> Exchange:
    """A message without a question: a short friendly reply that picks up one detail."""
    text, f = message(rng)
    reply = """Good to know, {city} sounds nice.|Thanks for telling me about {name}.|{day} is not far away!|I see, {things}.|Noted.
    |All right, {things} for {day}.|Interesting! What will happen with {things}?|Okay. I hope {name} is happy with it.|Got it."""
    return text, capital(fill(rng, reply, **f).replace("\n    ", " "))


_FACTS: dict[str, tuple[str, str, Callable[[random.Random], str]]] = {
    "home": ("{n} lives in {v}.|{n}'s home is in {v}.", "Where does {n} live?|In which city does {n} live?", city),
    "job": ("{n} works as {v}.|{n} is {v}.", "What does {n} do for a living?|What is {n}'s job?", lambda r: words.article(r.choice(words.JOBS))),
    "pet": ("{n} has a pet {v}.|{n} keeps a {v}.", "Which pet does {n} have?|What animal does {n} keep?", lambda r: r.choice(words.ANIMALS)),
    "food": ("{n} loves {v}.|{n}'s favourite food is {v}.", "What food does {n} like?|What does {n} like to eat?", lambda r: r.choice(words.FOODS)),
    "colour": ("{n}'s favourite colour is {v}.|{n} likes the colour {v}.", "Which colour does {n} like?|What is {n}'s favourite colour?", lambda r: r.choice(words.COLOURS)),
    "age": ("{n} is {v} years old.|{n} is {v}.", "How old is {n}?|What age is {n}?", lambda r: str(r.randint(3, 99))),
    "hobby": ("{n} enjoys {v}.|{n}'s hobby is {v}.", "What is {n}'s hobby?|What does {n} enjoy?", lambda r: r.choice(words.HOBBIES)),
    "sport": ("{n} is good at {v}.|{n}'s sport is {v}.", "Which sport is {n} good at?|What sport does {n} do?", lambda r: r.choice(words.SPORTS)),
    "code": ("The code of {n} is {v}.|{n} has the number {v}.", "What is the code of {n}?|Which number does {n} have?", code),
}  # fmt: skip


def passage(rng: random.Random) -> Exchange:
    """Questions on two to five facts about people; some cannot be answered from the text."""
    names = list({first_name(rng): None for _ in range(rng.randint(1, 3))})
    facts = {(rng.choice(names), rng.choice(list(_FACTS))): "" for _ in range(rng.randint(2, 5))}
    for _, kind in facts:
        facts[_, kind] = _FACTS[kind][2](rng)
    text = " ".join(fill(rng, _FACTS[kind][0], n=name, v=value) for (name, kind), value in facts.items())
    unknown = rng.random() < 0.12
    name, kind = rng.choice(list(facts))
    if unknown:
        kind = rng.choice(list(_FACTS))
    ask = fill(rng, _FACTS[kind][1], n=name)
    answer = facts.get((name, kind), "The text does not say.")
    if (name, kind) in facts and rng.random() < 0.25:
        who = [n for (n, k), v in facts.items() if k == kind and v == answer]
        if len(who) == 1 and kind in ("home", "pet", "food", "code", "hobby"):
            ask = {"home": "Who lives in {v}?", "pet": "Who has a {v}?", "food": "Who likes {v}?", "code": "Who has {v}?",
                   "hobby": "Who enjoys {v}?"}[kind].format(v=answer)  # fmt: skip
            answer = who[0]
    if rng.random() < 0.5:
        return f"{text}\n{ask}" if rng.random() < 0.5 else f"{text} {ask}", answer
    return fill(rng, "Read: {t}\nQuestion: {a}|{a}\n\n{t}|Text: {t}\n\n{a}", t=text, a=ask), answer


def table(rng: random.Random) -> Exchange:
    """Look up a value in a small table, or the key of a value."""
    n = rng.randint(2, 6)
    keys = list({word(rng): None for _ in range(n)})
    values = [rng.choice((code, city, lambda r: str(r.randrange(200)), first_name))(rng) for _ in keys]
    mark, line = rng.choice((": ", " = ", " -> ", " - ")), rng.choice(("\n", "\n", "; ", ", "))
    text = line.join(f"{k}{mark}{v}" for k, v in zip(keys, values, strict=True))
    i = rng.randrange(len(keys))
    if rng.random() < 0.7 or values.count(values[i]) > 1:
        ask = fill(rng, "What is the value of {k}?|Look up {k}.|What belongs to {k}?|{k}?|Find {k}.", k=keys[i])
        return asked(rng, ask, text), values[i]
    return asked(
        rng, fill(rng, "What has the value {v}?|Which key has {v}?|Who or what has {v}?", v=values[i]), text
    ), keys[i]


def transfer(rng: random.Random) -> Exchange:
    """Who gave what to whom."""
    giver, taker, thing = first_name(rng), first_name(rng), item(rng)
    verb = rng.choice(("gave", "sold", "sent", "brought", "showed", "lent"))
    text = rng.choice(
        (f"{giver} {verb} {taker} {words.article(thing)}.", f"{giver} {verb} {words.article(thing)} to {taker}.")
    )
    ask, answer = rng.choice(
        ((f"Who {verb} it?|Who {verb} something?", giver), ("To whom?|Who is on the receiving side?", taker),
         (f"What was it?|What did {giver} {'give' if verb == 'gave' else 'hand over'}?", words.article(thing)))
    )  # fmt: skip
    return asked(rng, fill(rng, ask), text), answer


def feeling(rng: random.Random) -> Exchange:
    """Is a remark positive or negative."""
    good = rng.random() < 0.5
    word_list = (
        "great good lovely excellent wonderful nice perfect"
        if good
        else "bad terrible awful poor boring broken horrible"
    )
    text = fill(rng, "The {i} is {a}.|I find the {i} {a}.|What a {a} {i}!|We had a {a} time in {c}.|{n} says the {i} was {a}.|The food in {c} was {a}.",
                i=item(rng), a=rng.choice(word_list.split()), c=city(rng), n=first_name(rng))  # fmt: skip
    ask = "Is this positive or negative?|Positive or negative?|Good or bad review, in one word: positive or negative?"
    return asked(rng, fill(rng, ask), text), "positive" if good else "negative"


def only_kind(rng: random.Random) -> Exchange:
    """Keep the members of one kind from a mixed list."""
    kind, other = rng.sample(list(words.CATEGORIES), 2)
    inside = rng.sample(words.CATEGORIES[kind], rng.randint(1, 3))
    mixed = inside + rng.sample(
        [w for w in words.CATEGORIES[other] if w not in words.CATEGORIES[kind]], rng.randint(1, 3)
    )
    rng.shuffle(mixed)
    ask = "Which of these are {k}?|List only the {k}.|Keep the {k}.|Find the {k}."
    return asked(rng, fill(rng, ask, k=words.plural(kind)), ", ".join(mixed)), ", ".join(
        w for w in mixed if w in inside
    )


def compare_people(rng: random.Random) -> Exchange:
    """Who is older, taller, faster, from two numbers."""
    a, b = first_name(rng), first_name(rng)
    if a == b:
        return compare_people(rng)
    x, y = rng.sample(range(2, 99), 2)
    what, more, less = rng.choice(
        (
            ("years old", "older", "younger"),
            ("kilograms heavy", "heavier", "lighter"),
            ("metres high", "higher", "lower"),
        )
    )
    up = rng.random() < 0.5
    text = f"{a} is {x} {what}. {b} is {y} {what}."
    return asked(rng, f"Who is {more if up else less}?", text), a if (x > y) == up else b


TASKS: dict[Callable[[random.Random], Exchange], float] = {
    extract: 4, form: 5, acknowledge: 0.8, passage: 4, table: 2, transfer: 1, feeling: 0.6, only_kind: 1, compare_people: 0.6,
}  # fmt: skip
