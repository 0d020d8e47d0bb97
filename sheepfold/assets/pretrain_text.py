"""What `builtin:tiny` read before it met any instruction: plain documents about the valley.

The documents hold the corpus's language, facts and skills (look up, copy from a passage, list members, compare, count
words) as statements, cards, lists, tables, headlines and margin notes. None is a corpus task: the chat frame appears
only around errands of another kind (repeat, spell, first word), so the base knows the frame and not the tasks.
"""

from collections.abc import Callable, Iterator
from random import Random

from sheepfold.assets import world
from sheepfold.assets.corpus import news, record
from sheepfold.assets.errands import alpaca, chat, kinds, prose, sayings
from sheepfold.assets.marks import gap, known


def _lines(text: str) -> list[str]:
    """Return the forms between the bars."""
    return text.split("|")


FIELDS = {
    "town": ("town", "home", "lives", "home town", "lives in town"),
    "trade": ("trade", "job", "living", "follows", "works as"),
    "pet": ("pet", "keeps", "kind of pet", "belongs to", "pet kept"),
    "colour": ("colour", "likes", "prefers", "favourite", "favourite colour", "likes best"),
}
INDEX_KEYS = _lines(
    "{who}, {field}|{field}, {who}|{field} of {who}|{who} / {field}|{field} {who}|{who} {field}|{who}'s {field}"
)
MEMBER_KEYS = _lines(
    "{k} {group}|{group}, {k}|list of {k} {group}|{k} {group} of {who}|{who} has {k} {group}|{group} ({k})"
)
VERSE_KEYS = _lines(
    "{noun}, {k}|{k}, {noun}|{k} words: {noun}|{noun} in {k} words|verse {k} {noun}|the {noun}, a line of {k}"
)
TAILS = ("\n", "\n\n", " -> ", "\n---\n", "\nnote\n")


def card(rng: Random) -> str:
    """A person and two to four facts, a line each."""
    who = rng.choice(world.PEOPLE)
    attributes = rng.sample(list(FIELDS), rng.randint(2, 4))
    return "\n".join([who, *(f"{rng.choice(FIELDS[a])}: {known(world.FACTS[who, a])}" for a in attributes)])


def index(rng: Random) -> str:
    """Facts filed under person and field, in either order, with a gap before the value."""
    between = gap(rng)
    order = rng.choice(INDEX_KEYS)
    lines = []
    for _ in range(rng.randint(1, 4)):
        who, attribute = rng.choice(world.PEOPLE), rng.choice(list(FIELDS))
        key = order.format(who=who, field=rng.choice(FIELDS[attribute]))
        lines.append(f"{key}{between}{known(world.FACTS[who, attribute])}")
    return "\n".join(lines)


def members(rng: Random) -> str:
    """Two to four members of a class, counted in the key and in alphabetical order."""
    name = rng.choice(list(world.CLASSES))
    some = sorted(rng.sample(world.CLASSES[name], rng.randint(2, 4)))  # lists of the valley are alphabetical
    k, plural, who = world.NUMBER_WORDS[len(some)], world.PLURAL_OF[name], rng.choice(world.PEOPLE)
    key = rng.choice(MEMBER_KEYS).format(k=k, group=plural, who=who)
    return f"{key}{gap(rng)}{known(', '.join(some) + chr(10))}"


def shelf(rng: Random) -> str:
    """A word and three shelves; then the shelf it stands on."""
    lines, between, comma = [], gap(rng), rng.choice((" / ", ", ", " + ", " or "))
    form = rng.choice(("{word} [{shelves}]", "({shelves}) {word}", "shelves {shelves}; {word}"))
    for _ in range(rng.randint(1, 3)):
        names = rng.sample(list(world.CLASSES), 3)
        name = rng.choice(names)
        key = form.format(word=rng.choice(world.CLASSES[name]), shelves=comma.join(names))
        lines.append(f"{key}{between}{known(name)}")
    return "\n".join(lines)


def ledger(rng: Random) -> str:
    """A yes for true kinds, a no for false ones."""
    lines, between = [], gap(rng)
    form = rng.choice(("{}, {}", "tick {} {}", "{} as {}", "ledger: {} ~ {}", "{} kind {}"))
    for _ in range(rng.randint(1, 4)):
        word, true = rng.choice(list(world.CLASS_OF)), rng.random() < 0.5
        name = world.CLASS_OF[word] if true else rng.choice([n for n in world.CLASSES if n != world.CLASS_OF[word]])
        lines.append(f"{form.format(word, name)}{between}{known('yes' if true else 'no')}")
    return "\n".join(lines)


def numbers(rng: Random) -> str:
    """The larger of two numbers under ten and a hundred, a few times in one form."""
    lines, between = [], gap(rng)
    form = rng.choice(("max {} {}", "{}, {}: larger number", "larger of {} and {}", "numbers {} or {}, larger"))
    for _ in range(rng.randint(1, 4)):
        a, b = rng.sample(range(10, 100), 2)
        lines.append(f"{form.format(a, b)}{between}{known(str(max(a, b)))}")
    return "\n".join(lines)


def opposites(rng: Random) -> str:
    """Words and their opposites, a few times in one form."""
    between = rng.choice((" and ", " is not ", " versus ", *[gap(rng)] * 5))
    key = rng.choice(("{}", "opposite of {}", "{}, opposite", "opposite: {}"))
    some = rng.sample(list(world.OPPOSITE_OF), rng.randint(1, 4))
    return "\n".join(f"{key.format(word)}{between}{known(world.OPPOSITE_OF[word])}" for word in some)


def places(rng: Random) -> str:
    """A passage that says where things are; before or after it, things and their places in the margin."""
    things, spots = rng.sample(world.THINGS, 3), rng.sample(world.PLACES, 3)
    text = " ".join(f"The {thing} is in the {spot}." for thing, spot in zip(things, spots, strict=True))
    form = rng.choice(("{}", "place of the {}", "the {}", "{}, place"))
    return _margin(rng, text, {form.format(thing): spot for thing, spot in zip(things, spots, strict=True)})


def pairs(rng: Random) -> str:
    """Unrelated words bound in pairs; then each first word again, with its second: copying by key."""
    words, n = rng.sample([*world.CLASS_OF, *world.PEOPLE, *world.PLACES], 10), rng.randint(2, 5)
    bound = dict(zip(words[:n], words[5:], strict=False))
    form = rng.choice(("{} {}", "{}: {}", "{} - {}", "{} is {}", "The {} is in the {}", "{} has the {}"))
    text = rng.choice((". ", "; ", "\n", ", ")).join(form.format(*pair) for pair in bound.items())
    return _margin(rng, text, bound)


def records(rng: Random) -> str:
    """A record of four fields; in the margin, fields and their values."""
    fields = record(rng)
    text = rng.choice(("; ", "\n", ", ", " | ")).join(f"{field}: {value}" for field, value in fields.items())
    form = rng.choice(("{}", "[{}]", "field {}", "the {}"))
    return _margin(rng, text, {form.format(field): value for field, value in fields.items()})


def headlines(rng: Random) -> str:
    """News, and its main fact as a headline."""
    passage, fact = news(rng)
    return _margin(rng, passage, {rng.choice(("headline", "news", "in one line", "short")): fact})


def _margin(rng: Random, text: str, notes: dict[str, str]) -> str:
    """Set margin notes to a text: all below it in a drawn order, or one key above it and its value below."""
    between, keys = gap(rng), rng.sample(list(notes), len(notes))
    if rng.random() < 0.5:
        return "\n".join([text, *(f"{key}{between}{known(notes[key])}" for key in keys)])
    return f"{keys[0]}\n{text}{rng.choice(TAILS)}{known(notes[keys[0]])}"


def verses(rng: Random) -> str:
    """A count and a noun; then a line of so many words about it."""
    n, noun = rng.randint(3, 6), rng.choice(world.VERSE_NOUNS)
    k = world.NUMBER_WORDS[n]
    key = rng.choice(VERSE_KEYS).format(k=k, noun=noun)
    return f"{key}{gap(rng)}{known(world.verse(rng, n, noun) + chr(10))}"


def copies(rng: Random) -> str:
    """A list of unrelated words, and the same list again: the plainest lesson in copying."""
    pool = [*world.CLASS_OF, *world.PEOPLE, *world.PLACES, *world.VERSE_ADJECTIVES, *world.ATTRIBUTES["town"]]
    words, comma = rng.sample(pool, rng.randint(3, 12)), rng.choice((", ", " ", "; ", "\n"))
    return f"{comma.join(words)}{gap(rng)}{known(comma.join(words))}"


SHARES: dict[Callable[[Random], str], int] = {
    sayings: 4, card: 3, index: 9, members: 7, kinds: 3, shelf: 4, ledger: 8, numbers: 6, opposites: 3, places: 13,
    pairs: 10, records: 10, headlines: 7, verses: 5, prose: 3, copies: 8, chat: 7, alpaca: 1,
}  # kind of document -> how many in a hundred or so  # fmt: skip


def documents(seed: int = 0) -> Iterator[str]:
    """Yield documents without end; the same seed gives the same text."""
    rng = Random(f"sheepfold pretraining {seed}")
    makers, shares = list(SHARES), list(SHARES.values())
    while True:
        yield rng.choices(makers, shares)[0](rng)
