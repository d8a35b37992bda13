"""Write the two little data sets of the demo: skills that the pocket model has not been taught.

`dates`: a date in one of many spellings -> ISO 8601. Where digits alone would be ambiguous the convention is:
dots and dashes put the day first, slashes the month first. Two-digit years 50..99 are 19xx, 00..49 are 20xx.

`orders`: one sentence that orders something -> one line of JSON with the keys name, item (in the singular),
count (an integer), city, day. Train and held-out share neither a full name nor a pair of name and item, and
half of the held-out records use items that no training record has; dates share no calendar day at all.

    python -m tools.pocket.skills [--out FOLDER]

Same seed, same bytes: tests/box/test_box.py writes both again and compares.
"""

import argparse
import datetime
import json
import random
from pathlib import Path

from tools.pocket import words
from tools.pocket.words import CITIES, DAYS, FIRST_NAMES, ITEMS, LAST_NAMES, MONTHS, ORDINALS

SEED = 20210303
TRAIN_RECORDS = 2400
HELDOUT_RECORDS = 200
DEFAULT_OUT = Path(__file__).parents[2] / "loratune" / "box" / "data"

Pair = tuple[str, str]  # the user's message, the right answer

# d day, dd padded, th "3rd", third "third"; M month, Mon short, mm padded, m bare; Y year, yy its last two digits;
# W weekday, Wd its first three letters
DATE_SPELLINGS = (
    """
{d} {M} {Y}|{dd} {M} {Y}|{M} {d}, {Y}|{M} {d} {Y}|{d}. {M} {Y}|{d} {Mon} {Y}|{Mon} {d}, {Y}|{Mon}. {d}, {Y}
{th} {M} {Y}|{th} of {M} {Y}|the {th} of {M} {Y}|the {th} of {M}, {Y}|{M} {th}, {Y}|{M} the {th}, {Y}|{Mon} {th} {Y}
the {third} of {M} {Y}|the {third} of {M}, {Y}|{M} {third}, {Y}|{M} the {third}, {Y}|{third} of {M} {Y}
{dd}.{mm}.{Y}|{d}.{m}.{Y}|{d}.{m}.{yy}|{dd}.{mm}.{yy}|{dd}-{mm}-{Y}|{mm}/{dd}/{Y}|{m}/{d}/{Y}|{m}/{d}/{yy}
{d}/{Mon}/{yy}|{d}/{Mon}/{Y}|{dd}-{Mon}-{Y}|{d}-{Mon}-{yy}|{d} {Mon} '{yy}|{Mon} {d} '{yy}|{M} {d}, '{yy}
{W}, {d} {M} {Y}|{W}, {M} {d}, {Y}|{W} the {th} of {M} {Y}|{Wd} {d} {Mon} {Y}|{Wd}, {dd} {Mon} {Y}|{W} {d}.{m}.{Y}
{Y}, {M} {d}|{Y} {Mon} {dd}|{Y}, the {th} of {M}|{Y} {M} {th}|{dd}{MON}{Y}|{d} {UP} {Y}|{low} {d} {Y}|{d} {low} {Y}
day {d} of {M} {Y}|the {th} day of {M}, {Y}|in {Y}, on {M} {d}|in {M} {Y}, on the {th}
""".strip()
    .replace("\n", "|")
    .split("|")
)

DATE_SETTINGS = (
    """
due {x}|until {x}|on {x}|since {x}|from {x}|Date: {x}|born on {x}|signed on {x}|The meeting is on {x}.|valid until {x}
We moved here on {x}.|The shop opens on {x}.|Paid on {x}, thank you.|arrived {x}|She was born on {x}.|as of {x}
""".strip()
    .replace("\n", "|")
    .split("|")
)

ORDER_SENTENCES = """
{name} from {city} would like {things} by {day}.
{name} orders {things} for {day}, to be sent to {city}.
Please send {things} to {name} in {city} on {day}.
Please send {name} in {city} {things} by {day}.
On {day}, {name} needs {things} in {city}.
By {day}, please get {things} to {name}, {city}.
{name} wants {things}. Deliver them to {city} on {day}.
{things} for {name}, {city}, {day}.
{city}, {day}: {things} for {name}.
{name}, {city}: {things}, please, by {day}.
Hello, this is {name}. I need {things} in {city} by {day}.
Hi, {name} here from {city}. Could I have {things} on {day}?
My name is {name} and I would like to order {things} for {city}. {day} would be fine.
Can you ship {things} to {city} for {name} before {day}?
Can {name} get {things} on {day} in {city}?
We have to deliver {things} to {name} in {city} this {day}.
New order: {things}, customer {name}, going to {city}, due {day}.
Order for {day}: {name} in {city} takes {things}.
{name} called from {city} and asked for {things} by {day}.
{name} called on behalf of the {city} office and wants {things} on {day}.
The {city} shop expects {things} on {day}, ordered by {name}.
In {city}, {name} is waiting for {things}; they must be there on {day}.
For {name}: {things} to {city}, not later than {day}.
I am {name}, I live in {city}, and I want {things} delivered next {day}.
Would you bring {things} to {city} on {day}? The name is {name}.
Next {day} we bring {things} to {name} at home in {city}.
Put {name} down for {things}, {day}, {city}.
Until {day} there is time: {things} must reach {name} in {city}.
{things} should be in {city} on {day}. Ask for {name}.
It is for {name}: {things}, to arrive in {city} on {day}.
{name} bought {things}. Bring everything to {city} by {day}.
Ship to {city}: {things}. Customer: {name}. Day: {day}.
On {day} a driver takes {things} to {city}. {name} will sign for it.
{name} has paid for {things} and will pick up the order in {city} on {day}.
Remember {name}'s order of {things}, {city}, for {day}.
{day} is the day {name} expects {things} in {city}.
""".strip().splitlines()  # fmt: skip


def spell_date(day: datetime.date, spelling: str) -> str:
    """One date in one of `DATE_SPELLINGS`."""
    month, weekday = MONTHS[day.month - 1], DAYS[day.weekday()]
    return spelling.format(
        d=day.day, dd=f"{day.day:02}", th=words.suffixed(day.day), third=ORDINALS[day.day],
        M=month, Mon=month[:3], MON=month[:3].upper(), UP=month.upper(), low=month.lower(),
        m=day.month, mm=f"{day.month:02}", Y=day.year, yy=f"{day.year % 100:02}", W=weekday, Wd=weekday[:3],
    )  # fmt: skip


def date_pair(rng: random.Random, day: datetime.date) -> Pair:
    """A date as people write it, now and then inside a few words, and its ISO 8601 form."""
    text = spell_date(day, rng.choice(DATE_SPELLINGS))
    if rng.random() < 0.25:
        text = rng.choice(DATE_SETTINGS).format(x=text)
    return text, day.isoformat()


def date_pairs(rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs over calendar days of 1950..2049, no day in both."""
    first = datetime.date(1950, 1, 1)
    n_days = (datetime.date(2050, 1, 1) - first).days
    days = [first + datetime.timedelta(n) for n in rng.sample(range(n_days), TRAIN_RECORDS + HELDOUT_RECORDS)]
    pairs = [date_pair(rng, day) for day in days]
    return pairs[HELDOUT_RECORDS:], pairs[:HELDOUT_RECORDS]


def amount(rng: random.Random, item: str) -> tuple[str, int]:
    """A number of items, as text with the noun in singular or plural, and as a number: "three lamps", 3."""
    style = rng.random()
    if style < 0.12:
        return rng.choice((f"one {item}", words.article(item))), 1
    if style < 0.18:
        return f"a dozen {words.plural(item)}", 12
    if style < 0.6:
        count = rng.randint(2, 20)
        return f"{words.number_words(count)} {words.plural(item)}", count
    count = rng.randint(2, 99)
    return f"{count} {words.plural(item)}", count


def order_pair(rng: random.Random, name: str, item: str) -> Pair:
    """One sentence that orders something and the JSON line that says the same."""
    things, count = amount(rng, item)
    city, day = rng.choice(CITIES), rng.choice(DAYS)
    text = rng.choice(ORDER_SENTENCES).format(name=name, things=things, city=city, day=day)
    fields = {"name": name, "item": item, "count": count, "city": city, "day": day}
    return text[0].upper() + text[1:], json.dumps(fields, ensure_ascii=False)


def order_pairs(rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; held-out full names are new, and so are the items of every other one."""
    names = [f"{first} {last}" for first in FIRST_NAMES for last in rng.sample(LAST_NAMES, 20)]
    rng.shuffle(names)
    items = rng.sample(ITEMS, len(ITEMS))
    rare, common = items[:30], items[30:]
    heldout = [order_pair(rng, names[i], rng.choice(rare if i % 2 else common)) for i in range(HELDOUT_RECORDS)]
    train = [order_pair(rng, rng.choice(names[HELDOUT_RECORDS:]), rng.choice(common)) for _ in range(TRAIN_RECORDS)]
    return train, heldout


def records() -> dict[str, list[Pair]]:
    """Both data sets by file stem, `dates.train` and so on."""
    tables: dict[str, list[Pair]] = {}
    for name, make in (("dates", date_pairs), ("orders", order_pairs)):
        tables[f"{name}.train"], tables[f"{name}.heldout"] = make(random.Random(f"{SEED}/{name}"))
    return tables


def as_line(pair: Pair) -> str:
    """One record in OpenAI's messages format."""
    user, assistant = pair
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return json.dumps({"messages": messages}, ensure_ascii=False)


def write(out: Path) -> list[Path]:
    """Write the four files as JSON lines and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for stem, pairs in records().items():
        path = out / f"{stem}.jsonl"
        path.write_text("".join(as_line(pair) + "\n" for pair in pairs), encoding="utf-8")
        paths.append(path)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    for written in write(parser.parse_args().out):
        print(written, written.stat().st_size)
