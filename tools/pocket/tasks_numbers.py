# ruff: noqa: E501  (phrasings read best on one line)
"""Tasks on numbers, months, days and times: reckoning, comparing, words and figures, padding, ordinals, formats.

Dates appear in many human spellings and are taken apart or rewritten from one to another, always with the wanted
form in the prompt. ISO 8601 (year-month-day with dashes) is left out on purpose: that is the demo's skill to learn.
"""

import datetime
import random
from collections.abc import Callable

from tools.pocket import words
from tools.pocket.grammar import Exchange, asked, fill, first_name, item, listed
from tools.pocket.words import DAYS, MONTHS, ORDINALS, number_words, suffixed


def _figure(rng: random.Random, n: int) -> str:
    return number_words(n) if n < 1000 and rng.random() < 0.2 else str(n)


def add(rng: random.Random) -> Exchange:
    """Sums of two or three small numbers."""
    limit = rng.choice((10, 10, 20, 100, 100, 1000))
    a, b = rng.randrange(limit), rng.randrange(limit)
    if rng.random() < 0.2:
        c = rng.randrange(limit)
        return fill(
            rng, "{a} + {b} + {c} = ?|Add {a}, {b} and {c}.|What is {a} plus {b} plus {c}?", a=a, b=b, c=c
        ), str(a + b + c)
    ask = "What is {a} + {b}?|{a} + {b} = ?|Add {a} and {b}.|What is {a} plus {b}?|Calculate {a} + {b}.|{a} plus {b}?"
    return fill(rng, ask, a=_figure(rng, a), b=_figure(rng, b)), str(a + b)


def subtract(rng: random.Random) -> Exchange:
    """Differences that do not go below zero."""
    limit = rng.choice((10, 20, 100, 1000))
    a, b = sorted((rng.randrange(limit), rng.randrange(limit)), reverse=True)
    ask = "What is {a} - {b}?|{a} - {b} = ?|Subtract {b} from {a}.|What is {a} minus {b}?|Take {b} away from {a}."
    return fill(rng, ask, a=a, b=b), str(a - b)


def multiply(rng: random.Random) -> Exchange:
    """Times tables and the divisions that go with them."""
    a, b = rng.randint(0, 12), rng.randint(1, 12)
    if rng.random() < 0.6:
        ask = "What is {a} x {b}?|What is {a} times {b}?|{a} * {b} = ?|Multiply {a} by {b}."
        return fill(rng, ask, a=a, b=b), str(a * b)
    return fill(rng, "What is {a} divided by {b}?|{a} / {b} = ?|Divide {a} by {b}.", a=a * b, b=b), str(a)


def word_problem(rng: random.Random) -> Exchange:
    """One-step stories with numbers."""
    name, thing = first_name(rng), words.plural(item(rng))
    a, b = rng.randint(2, 30), rng.randint(2, 30)
    big, small = max(a, b), min(a, b)
    ask, n = rng.choice(
        (("{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?", a + b),
         ("{n} has {x} {t} and gives away {y}. How many are left?", big - small),
         ("There are {x} {t} in the shop. {n} buys {y}. How many {t} are still there?", big - small),
         ("{n} finds {a} {t} on Monday and {b} on Tuesday. How many in all?", a + b))
    )  # fmt: skip
    text = ask.format(n=name, t=thing, a=a, b=b, x=big, y=small)
    return text, rng.choice((str(n), f"{n} {thing}.", f"{n}"))


def compare(rng: random.Random) -> Exchange:
    """Which of some numbers is larger or smaller; sorting; even and odd."""
    limit = rng.choice((10, 100, 1000, 10000))
    numbers = rng.sample(range(limit), rng.randint(2, 5))
    text = ", ".join(map(str, numbers))
    ask, answer = rng.choice(
        (("Which number is the largest?|What is the maximum?|Find the biggest number.", str(max(numbers))),
         ("Which number is the smallest?|What is the minimum?|Find the smallest number.", str(min(numbers))),
         ("Sort these numbers.|Put in ascending order.|Order from small to large.", ", ".join(map(str, sorted(numbers)))),
         ("Sort in descending order.|Order from large to small.", ", ".join(map(str, sorted(numbers, reverse=True)))))
    )  # fmt: skip
    if rng.random() < 0.15:
        n = numbers[0]
        return fill(rng, "Is {n} even or odd?|Even or odd: {n}?", n=n), "odd" if n % 2 else "even"
    return asked(rng, fill(rng, ask), text), answer


def count_on(rng: random.Random) -> Exchange:
    """Rows of numbers and the number next to a number."""
    start, step = rng.randint(0, 90), rng.choice((1, 1, 2, 3, 5, 10))
    if rng.random() < 0.5:
        row = [start + i * step for i in range(rng.randint(3, 6))]
        ask = "What comes next?|Continue the row with one number.|Which number follows?"
        return asked(rng, fill(rng, ask), ", ".join(map(str, row[:-1]))), str(row[-1])
    end = start + rng.randint(2, 8)
    ask = "Count from {a} to {b}.|List the numbers from {a} to {b}.|Write all numbers from {a} to {b}."
    return fill(rng, ask, a=start, b=end), ", ".join(map(str, range(start, end + 1)))


def figures(rng: random.Random) -> Exchange:
    """Number words to figures and back."""
    n = rng.randrange(rng.choice((13, 21, 100, 100, 1000, 3000)))
    if rng.random() < 0.6:
        ask = "Write {w} in figures.|Write {w} as a number.|Which number is {w}?|{w} in digits?|Digits for {w}:"
        return fill(rng, ask, w=number_words(n)), str(n)
    return fill(
        rng, "Write {n} in words.|Spell out the number {n}.|How do you say {n}?|{n} in words?", n=n
    ), number_words(n)


def ordinal(rng: random.Random) -> Exchange:
    """Ordinals: third, 3rd, 3."""
    n = rng.randint(1, 31)
    forms = (str(n), suffixed(n), ORDINALS[n])
    source, target = rng.sample(range(3), 2)
    name = (
        "a plain number|a number|digits only",
        "a short ordinal|an ordinal with digits",
        "an ordinal word|ordinal in words",
    )[target]
    ask = "Write {x} as {n}.|{x} as {n}?|Turn {x} into {n}.|Change {x} to {n}."
    return fill(rng, ask, x=forms[source], n=fill(rng, name)), forms[target]


def pad(rng: random.Random) -> Exchange:
    """Leading zeros on and off."""
    width = rng.choice((2, 2, 2, 3, 4, 5))
    n = rng.randrange(10 ** rng.randint(1, width))
    padded, count = f"{n:0{width}}", number_words(width)
    if rng.random() < 0.65:
        ask = """Write {n} with {w} digits.|Pad {n} to {w} digits.|Write {n} as a {w}-digit number with leading zeros.
        |Zero-pad {n} to {w} digits.|{n} with {w} digits?"""
        return fill(rng, ask, n=n, w=rng.choice((count, width))).replace("\n        ", " "), padded
    return fill(
        rng,
        "Remove the leading zeros: {n}|Write {n} without leading zeros.|Strip the zeros in front of {n}.",
        n=padded,
    ), str(n)


def year(rng: random.Random) -> Exchange:
    """Two-digit years to four digits and back: 50 to 99 are 19xx, 00 to 49 are 20xx."""
    y = rng.randint(1950, 2049)
    short = f"{y % 100:02}"
    if rng.random() < 0.7:
        ask = "Write the year '{s} with four digits.|Which year is '{s}?|Full year for '{s}:|The year {s} in full?|Expand '{s}."
        return fill(rng, ask, s=short), str(y)
    return fill(rng, "Write the year {y} with two digits.|Shorten the year {y}.|Last two digits of {y}?", y=y), short


def month(rng: random.Random) -> Exchange:
    """Month names, short names and numbers, padded or not."""
    m = rng.randint(1, 12)
    name = MONTHS[m - 1]
    shown = rng.choice((name, name, name[:3], name.upper(), name.lower(), name[:3].upper(), name[:3] + "."))
    style = rng.randrange(5)
    if style == 0:
        return fill(
            rng,
            "Which month has number {m}?|Name of month {m}?|Month number {m} is called:",
            m=rng.choice((m, f"{m:02}")),
        ), name
    if style == 1:
        return fill(rng, "Write {x} with three letters.|Short form of {x}?|Abbreviate {x}.", x=name), name[:3]
    if style == 2:
        return fill(rng, "Write out the month {x}.|Full name of {x}?|Which month is {x}?", x=name[:3]), name
    if style == 3:
        return fill(
            rng, "What number is {x}?|Number of the month {x}?|Which month of the year is {x}, as a number?", x=shown
        ), str(m)
    ask = "Month number of {x} with two digits?|Write {x} as a two-digit month.|{x} as two digits?"
    return fill(rng, ask, x=shown), f"{m:02}"


def calendar(rng: random.Random) -> Exchange:
    """Days and months before and after, lengths of months, seasons."""
    i, j = rng.randrange(7), rng.randrange(12)
    style = rng.randrange(7)
    if style == 0:
        return fill(
            rng, "What day comes after {d}?|Which day follows {d}?|The day after {d} is ...", d=DAYS[i]
        ), DAYS[(i + 1) % 7]
    if style == 1:
        return fill(rng, "What day comes before {d}?|Which day is right before {d}?", d=DAYS[i]), DAYS[i - 1]
    if style == 2:
        return fill(rng, "Which month comes after {m}?|What month follows {m}?", m=MONTHS[j]), MONTHS[(j + 1) % 12]
    if style == 3:
        return fill(rng, "Which month comes before {m}?|What month is right before {m}?", m=MONTHS[j]), MONTHS[j - 1]
    if style == 4:
        n = 30 if j + 1 in (4, 6, 9, 11) else 31
        return fill(rng, "How many days does {m} have?|Days in {m}?", m=MONTHS[j]), "28 or 29" if j == 1 else str(n)
    if style == 5:
        season = next(s for s, ms in words.SEASONS.items() if j + 1 in ms)
        return fill(rng, "In which season is {m}?|Which season does {m} belong to?", m=MONTHS[j]), season
    full = DAYS[i]
    return fill(rng, "Which day is {d} short for?|Write out {d}.|Full name of {d}?", d=full[:3]), full


def clock(rng: random.Random) -> Exchange:
    """Twelve-hour and twenty-four-hour times; hours, minutes, units."""
    h, m = rng.randrange(24), rng.choice((0, 0, 15, 30, 45, rng.randrange(60)))
    half = f"{(h - 1) % 12 + 1}:{m:02} {'am' if h < 12 else 'pm'}"
    style = rng.randrange(4)
    if style == 0:
        return fill(rng, "Write {t} in 24-hour time.|{t} as a 24-hour time?", t=half), f"{h:02}:{m:02}"
    if style == 1:
        return fill(rng, "Write {t} with am or pm.|{t} in 12-hour time?", t=f"{h:02}:{m:02}"), half
    if style == 2:
        n, (big, small, k) = rng.randint(1, 12), rng.choice((("hours", "minutes", 60), ("days", "hours", 24), ("weeks", "days", 7),
                                                           ("years", "months", 12), ("metres", "centimetres", 100)))  # fmt: skip
        return fill(rng, "How many {s} are in {n} {b}?|{n} {b} in {s}?", n=n, b=big, s=small), f"{n * k} {small}"
    text = fill(rng, "The train leaves at {t}.|We meet at {t}.|It is {t} now.|The shop closes at {t}.", t=half)
    return asked(rng, fill(rng, "What time is it in the text?|Which time is named?|At what time?"), text), half


def _some_date(rng: random.Random) -> datetime.date:
    return datetime.date(1950, 1, 1) + datetime.timedelta(rng.randrange(36500))


_SPELLINGS = (
    "{d} {M} {Y}|{M} {d}, {Y}|{th} {M} {Y}|the {th} of {M} {Y}|{d} {Mon} {Y}|{Mon} {d}, {Y}|{M} {th}, {Y}|{M} the {third}, {Y}|"
    "the {third} of {M}, {Y}|{dd}.{mm}.{Y}|{d}.{m}.{Y}|{mm}/{dd}/{Y}|{d} {Mon} '{yy}|{d}. {M} {Y}|{W}, {d} {M} {Y}|{d}/{Mon}/{Y}|"
    "{W}, {M} {d}, {Y}|{dd}-{Mon}-{Y}|{Y}, {M} {d}|{d}.{m}.{yy}|{W} the {th} of {M} {Y}|{Wd} {d} {Mon} {Y}|{dd} {MON} {Y}|{th} {Mon} '{yy}"
)
# the form that is asked for, by example words in the prompt -> how to write it
_TARGETS: tuple[tuple[str, str], ...] = (
    ("day, month, year with dots|DD.MM.YYYY", "{dd}.{mm}.{Y}"),
    ("month/day/year with two digits each|MM/DD/YYYY", "{mm}/{dd}/{Y}"),
    ("day month year|D Month YYYY", "{d} {M} {Y}"),
    ("month day, year|Month D, YYYY", "{M} {d}, {Y}"),
    ("a short date|D Mon YYYY", "{d} {Mon} {Y}"),
    ("day and month only|D Month", "{d} {M}"),
    ("month and year only|Month YYYY", "{M} {Y}"),
    ("year and two-digit month|YYYY MM", "{Y} {mm}"),
    ("day.month|DD.MM", "{dd}.{mm}"),
    ("year, then month name, then day|YYYY Month D", "{Y} {M} {d}"),
    ("year/month|YYYY/MM", "{Y}/{mm}"),
    ("month and day as numbers|MM DD", "{mm} {dd}"),
    ("an ordinal date|the D-th of Month YYYY", "the {th} of {M} {Y}"),
)


def _written(day: datetime.date, spelling: str) -> str:
    name, weekday = MONTHS[day.month - 1], DAYS[day.weekday()]
    return spelling.format(
        d=day.day, dd=f"{day.day:02}", th=suffixed(day.day), third=ORDINALS[day.day], M=name, Mon=name[:3],
        MON=name[:3].upper(), m=day.month, mm=f"{day.month:02}", Y=day.year, yy=f"{day.year % 100:02}", W=weekday, Wd=weekday[:3],
    )  # fmt: skip


def date_part(rng: random.Random) -> Exchange:
    """The day, the month or the year of a written date."""
    day = _some_date(rng)
    text = _written(day, rng.choice(_SPELLINGS.split("|")))
    ask, answer = rng.choice(
        (("Which year is it?|What is the year?|Year only.|In which year?", str(day.year)),
         ("Which month is it?|What is the month?|Name the month.", MONTHS[day.month - 1]),
         ("Give the month as a number.|Month as a number?", str(day.month)),
         ("Which month is it, with two digits?|Two-digit month only.", f"{day.month:02}"),
         ("Which day of the month is it?|What is the day?|Day only.", str(day.day)),
         ("Which day is it, with two digits?|Two-digit day only.", f"{day.day:02}"))
    )  # fmt: skip
    return asked(rng, fill(rng, ask), text), answer


def date_form(rng: random.Random) -> Exchange:
    """A date from one human spelling to another, the wanted one named in the prompt."""
    day = _some_date(rng)
    text = _written(day, rng.choice(_SPELLINGS.split("|")))
    name, spelling = rng.choice(_TARGETS)
    ask = "Write this date as {n}.|Rewrite the date as {n}.|Format as {n}.|The date as {n}."
    return asked(rng, fill(rng, ask, n=fill(rng, name)), text), _written(day, spelling)


def sum_up(rng: random.Random) -> Exchange:
    """Prices and totals."""
    n, price = rng.randint(2, 9), rng.randint(1, 12)
    things = words.plural(item(rng))
    ask = "One costs {p} euros. What do {n} {t} cost?|{n} {t} at {p} dollars each: how much in all?"
    return fill(rng, ask, n=rng.choice((n, number_words(n))), p=price, t=things), str(n * price)


def numbers_in_text(rng: random.Random) -> Exchange:
    """Find or list the numbers in a sentence."""
    names = [first_name(rng) for _ in range(rng.randint(1, 3))]
    counts = [rng.randint(2, 60) for _ in names]
    parts = [f"{n} has {_figure(rng, c)} {words.plural(item(rng))}" for n, c in zip(names, counts, strict=True)]
    text = listed(parts) + "."
    ask = "Which numbers are in the text, in figures?|List the numbers as figures.|Write down the numbers in digits."
    return asked(rng, fill(rng, ask), text), ", ".join(map(str, counts))


TASKS: dict[Callable[[random.Random], Exchange], float] = {
    add: 2, subtract: 1, multiply: 1, word_problem: 1, compare: 1.2, count_on: 1, figures: 1.5, ordinal: 1.5, pad: 1.5,
    year: 1, month: 2, calendar: 1.2, clock: 1, date_part: 2, date_form: 3, sum_up: 0.5, numbers_in_text: 1.2,
}  # fmt: skip
