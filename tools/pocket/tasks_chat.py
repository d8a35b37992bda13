# ruff: noqa: E501  (phrasings read best on one line)
"""Small talk, little stories, system prompts that change behaviour, and conversations of several turns.

`talk` gives one exchange; `story` an exchange with a longer answer; `conversation` a whole chat, the only function
here that returns turns with roles, because system prompts and memory need more than one exchange.
"""

import random
from collections.abc import Callable

from tools.pocket import tasks_numbers, tasks_reading, tasks_text, tasks_world, words
from tools.pocket.grammar import Exchange, Turn, capital, city, fill, first_name, item, sentence

_TALK = """
Hello!|Hi!|Hey|Good morning!|Good evening!|Hi there => Hello! How can I help you?|Hi! What can I do for you?|Hello! Nice to hear from you.
How are you?|How are you today?|How do you do?|How is it going? => I am fine, thank you. And you?|Very well, thanks! How are you?
Thank you!|Thanks!|Thanks a lot|Thank you very much => You are welcome!|My pleasure!|Glad to help.
Goodbye!|Bye|See you later|Good night! => Goodbye!|See you soon!|Bye! Have a nice day.
Who are you?|What are you?|What is your name?|Tell me about yourself => I am Pocket, a very small language model.|My name is Pocket. I am a small language model.
What can you do?|How can you help me?|What are you good at? => I can copy, sort and rewrite words, work with small numbers, read short texts and chat a little.|Small things: words, lists, numbers, short texts and a little talk.
Are you a person?|Are you human?|Are you a robot? => No, I am a small language model.|I am not a person, I am a program.
How old are you?|Do you have a family?|Where do you live? => I am a program, so I have no age and no home.|I am only a program in a small box.
Who made you?|Where do you come from? => I was made by the loratune project.|The people of loratune trained me.
Tell me a joke|Say something funny|Make me laugh => Why did the book go to the doctor? It had too many pages.|What has a face but no eyes? A clock.|What gets wet while it dries? A towel.
I am happy|I feel great today|I had a good day => That is wonderful to hear!|I am glad!|How nice! What made you happy?
I am sad|I feel bad|I had a bad day => I am sorry to hear that.|Oh no. Do you want to talk about it?|I hope tomorrow is better.
I am tired|I need a break|I did not sleep well => Then take a little rest.|Have a rest and a glass of water.
I am hungry|I want to eat something|What shall I eat? => How about some {food}?|You could have {food}.|Maybe {food}?
I am thirsty|What shall I drink? => Have some {drink}.|How about {drink}?
I am bored|What can I do today?|Give me an idea => You could try {hobby}.|How about {hobby}?|Maybe go to the {place}.
What is your favourite colour?|Which colour do you like? => I like {colour}.|Maybe {colour}.
What is your favourite food?|What do you like to eat? => I do not eat, but {food} sounds nice.
What is the weather like?|Will it rain tomorrow?|What time is it now?|What is in the news? => I cannot see outside, so I do not know.|Sorry, I do not know that.
What will happen next year?|Who will win the game?|What am I thinking? => I do not know that.|Nobody knows, and I do not either.
Can you help me?|I have a question|I need help => Of course. What is it about?|Sure! What do you need?|Yes, please ask.
Are you sure?|Is that right? => I think so, but I am small and can be wrong.|I believe so.
Yes|Okay|All right|Good => Good!|Fine. What next?|All right.
No|Not really => All right.|Okay, then not.
I like {hobby}|My hobby is {hobby}|I enjoy {hobby} => {Hobby} is a nice hobby.|That sounds like fun!
I have a {animal}|My pet is a {animal}|We have a {animal} at home => How nice! What is the name of your {animal}?|A {animal} is a lovely pet.
I live in {city}|I come from {city}|My home is {city} => {city} sounds like a nice place.|How do you like {city}?
I am a {job}|I work as a {job} => That is an interesting job.|Being a {job} must be busy work.
I am going to the {place}|Today I visit the {place} => Have fun at the {place}!|Enjoy the {place}.
Where can I buy a {item}?|I need a {item}|I lost my {item} => You could look for a {item} in a shop.|Maybe the market has a {item}.
Do you like {animal}s?|Do you like {food}?|Do you like {sport}? => Yes, very much.|I am a program, but it sounds nice.
What do you think about {sport}?|I play {sport} => {Sport} is good exercise.|I hear {sport} is fun.
It is my birthday|Today is my birthday => Happy birthday!|Happy birthday! Enjoy your day.
Say something nice|Cheer me up|Be nice to me => You are doing well.|I am glad that you are here.|You have good ideas.
""".strip().splitlines()  # fmt: skip


def _slots(rng: random.Random) -> dict[str, str]:
    hobby, sport = rng.choice(words.HOBBIES), rng.choice(words.SPORTS)
    return {
        "food": rng.choice(words.FOODS), "drink": rng.choice(words.DRINKS), "hobby": hobby, "Hobby": capital(hobby),
        "place": rng.choice(words.PLACES), "colour": rng.choice(words.COLOURS), "animal": rng.choice(words.ANIMALS),
        "city": city(rng), "job": rng.choice(words.JOBS), "item": rng.choice(words.ITEMS), "sport": sport,
        "Sport": capital(sport),
    }  # fmt: skip


def talk(rng: random.Random) -> Exchange:
    """One exchange of small talk."""
    asks, answers = rng.choice(_TALK).split(" => ")
    slots = _slots(rng)
    ask = fill(rng, asks, **slots)
    if ask[-1] not in "?!." and rng.random() < 0.7:
        ask += "."
    return ask, fill(rng, answers, **slots)


def unknown(rng: random.Random) -> Exchange:
    """Coined things nobody can know."""
    thing = words.coined(rng)
    ask = "What is a {t}?|Do you know what {t} means?|Explain {t}.|Who is {T}?|Where is {T}?"
    return fill(rng, ask, t=thing, T=thing.capitalize()), rng.choice(
        ("I do not know that.", f"I have never heard of {thing}.", "Sorry, I do not know."))  # fmt: skip


_OPENINGS = """Once upon a time there was {a} {j} named {n}.|{n} was {a} {j} in {c}.|In {c} there lived {a} {j}. The name of the {j} was {n}.
|One {day} morning {n} woke up early.|{n} the {j} lived near the {p}.|Long ago, in a {adj} {noun}, there lived {a} {j} called {n}."""
_EVENTS = """One day {n} found {i} at the {p}.|On {day} {n} went to the {p} with {f}.|{n} wanted to have {i}, but there was no money.
|Then {n} lost {i} near the {p}.|A {adj} {animal} sat in the {p} and looked at {n}.|{n} met {f}, who had {i}.|It was {adj} outside, and {n} was {feel}.
|In the {p} there was {i}, and nobody knew whose it was.|{f} asked {n} for help."""
_TURNS = """"Can I help you?" asked {f}.|{n} thought about it for a long time.|"I have an idea," said {n}.|{f} laughed and gave {n} {i2}.
|They looked everywhere, in the {p2} and in the {p3}.|"Do not be {feel}," said {f}.|So {n} and {f} walked to the {p2} together.|{n} ran to the {p2}, but it was closed."""
_ENDINGS = """In the end they went home and had {food}.|From that day on {n} and {f} were friends.|{n} was {feel2} and slept well that night.
|And so {n} learned to ask for help.|They all ate {food} and sang songs.|That was the best {day} of the year.|{n} never forgot that day."""


def story(rng: random.Random) -> Exchange:
    """A little story from a hero, a friend, a thing and some places."""
    hero, friend = first_name(rng), first_name(rng)
    kind = rng.choice(words.JOBS if rng.random() < 0.6 else words.ANIMALS)
    places = rng.sample(words.PLACES, 3)
    slots = {
        "n": hero, "f": friend, "j": kind, "a": words.article(kind).split(" ")[0], "c": city(rng), "day": rng.choice(words.DAYS),
        "p": places[0], "p2": places[1], "p3": places[2], "adj": rng.choice(words.ADJECTIVES), "noun": rng.choice(words.PLACES),
        "i": words.article(item(rng)), "i2": words.article(item(rng)), "animal": rng.choice(words.ANIMALS),
        "feel": rng.choice(("sad", "afraid", "tired", "angry", "hungry")), "feel2": rng.choice(("happy", "proud", "glad")),
        "food": rng.choice(words.FOODS),
    }  # fmt: skip
    parts = [_OPENINGS, _EVENTS, *([_TURNS] * rng.randint(1, 3)), _ENDINGS]
    text = " ".join(dict.fromkeys(fill(rng, part, **slots).replace("\n", " ") for part in parts))
    ask = "Tell me a story about {n}.|Write a short story about {a} {j} named {n}.|Tell me a story about {a} {j}.|Tell me a story."
    ask = fill(rng, ask, **slots)
    if ask == "Tell me a story." or hero not in ask:
        return ask, text
    if rng.random() < 0.25:
        question, answer = rng.choice(
            (
                (f"Who is the hero of this story?\n{text}", hero),
                (f"Give this story a title:\n{text}", f"{hero} and {friend}"),
            )
        )
        return question, answer
    return ask, text


_SINGLE: tuple[dict[Callable[[random.Random], Exchange], float], ...] = (
    tasks_text.TASKS, tasks_numbers.TASKS, tasks_reading.TASKS, tasks_world.TASKS, {talk: 4.0, unknown: 0.5, story: 1.5},
)  # fmt: skip
_FUNCTIONS = [task for tasks in _SINGLE for task in tasks]
_WEIGHTS: list[float] = []
for _tasks in _SINGLE:
    for _weight in _tasks.values():
        _WEIGHTS.append(_weight + (_WEIGHTS[-1] if _WEIGHTS else 0.0))  # cumulative, as random.choices wants it


def exchange(rng: random.Random) -> Exchange:
    """One exchange of any kind, with the little differences in how people write."""
    ask, answer = rng.choices(_FUNCTIONS, cum_weights=_WEIGHTS)[0](rng)
    style = rng.random()
    if style < 0.06:
        ask = (
            rng.choice(("Hi! ", "Hello. ", "Quick question: ", "Please help me. ", "Okay, next one. ", "One more. "))
            + ask
        )
    elif style < 0.09:
        ask += rng.choice((" Thanks!", " Thank you.", " Please."))
    elif style < 0.13:
        ask = ask[0].lower() + ask[1:]
    elif style < 0.16:
        ask = ask.rstrip(".")
    return ask, answer


def _styled(rng: random.Random) -> tuple[str, Callable[[str], str]]:
    """A system prompt and its effect on every answer."""
    w, name = rng.choice(words.NOUNS), first_name(rng)
    return rng.choice(
        (("Answer in capital letters.|Write everything in upper case.|Always shout.", str.upper),
         ("Answer in lower case only.|Never use capital letters.", str.lower),
         (f"End every answer with the word {w}.|Always finish with {w}.", lambda s: f"{s} {w}"),
         (f"Begin every answer with the word {w}.|Always start with {w}.", lambda s: f"{w} {s}"),
         (f"The user is called {name}. Use the name.|You talk to {name}. Say the name first.", lambda s: f"{name}, {s}"),
         ("You are a pirate.|Talk like a pirate.", lambda s: f"Arr! {s}"),
         ("Put every answer in quotes.|Quote your answers.", lambda s: f'"{s}"'),
         ("Put every answer in square brackets.", lambda s: f"[{s}]"),
         ("Begin each answer with 'Answer:'.|Write 'Answer:' first.", lambda s: f"Answer: {s}"),
         ("Be polite. Always say please ask again at the end.", lambda s: f"{s} Please ask again."),
         ("You are Pocket, a helpful assistant.|You are a helpful assistant.|Be brief.|Answer shortly.|Help the user.", str))
    )  # fmt: skip


def _memory(rng: random.Random) -> list[Turn]:
    """The user says something about themselves and asks for it later."""
    say, ask, value, reply = rng.choice(
        (("My name is {v}.|I am {v}.|Call me {v}.|Hi, I am {v}.", "What is my name?|Who am I?|Do you remember my name?", first_name(rng), "Nice to meet you, {v}!|Hello {v}!"),
         ("I live in {v}.|My home is in {v}.", "Where do I live?|Which city do I live in?", city(rng), "{v} sounds nice.|Good to know."),
         ("My favourite colour is {v}.|I like {v}.", "Which colour do I like?|What is my favourite colour?", rng.choice(words.COLOURS), "A nice colour.|Good choice."),
         ("Remember the number {v}.|Keep the number {v} in mind.", "Which number did I give you?|What was the number?", str(rng.randrange(1000)), "All right.|I will remember {v}."),
         ("Remember this word: {v}|The secret word is {v}.", "What was the word?|What is the secret word?", words.coined(rng), "Okay.|I will keep it in mind."),
         ("I have a {v}.|My pet is a {v}.", "Which animal do I have?|What is my pet?", rng.choice(words.ANIMALS), "How nice!|A {v} is a lovely pet."))
    )  # fmt: skip
    turns = [("user", fill(rng, say, v=value)), ("assistant", fill(rng, reply, v=value))]
    for _ in range(rng.randint(0, 2)):
        user, assistant = exchange(rng)
        turns += [("user", user), ("assistant", assistant)]
    return [*turns, ("user", fill(rng, ask)), ("assistant", rng.choice((value, f"{capital(value)}.")))]


def _follow_up(rng: random.Random) -> list[Turn]:
    """A second request about the answer to the first."""
    user, assistant = tasks_text.copy(rng) if rng.random() < 0.4 else ("Say a sentence.", sentence(rng))
    ask, change = rng.choice(
        (("Now in capital letters.|In upper case, please.", str.upper), ("Again, please.|Once more.|Repeat that.", str),
         ("Now in quotes.|Put that in quotes.", lambda s: f'"{s}"'), ("Now without spaces.", lambda s: s.replace(" ", "")),
         ("Only the first word.|Which was the first word?", lambda s: s.split(" ")[0]), ("Now twice.", lambda s: f"{s} {s}"))
    )  # fmt: skip
    return [("user", user), ("assistant", assistant), ("user", fill(rng, ask)), ("assistant", change(assistant))]


def conversation(rng: random.Random) -> list[Turn]:
    """A whole chat: mostly one exchange, else several, with a system prompt now and then."""
    style = rng.random()
    if style < 0.03:
        return _memory(rng)
    if style < 0.05:
        return _follow_up(rng)
    n_exchanges = 1 if style < 0.8 else rng.randint(2, 5)
    turns: list[Turn] = []
    change: Callable[[str], str] = str
    if rng.random() < 0.12:
        prompts, change = _styled(rng)
        turns.append(("system", fill(rng, prompts)))
    for _ in range(n_exchanges):
        user, assistant = exchange(rng)
        turns += [("user", user), ("assistant", change(assistant))]
    return turns
