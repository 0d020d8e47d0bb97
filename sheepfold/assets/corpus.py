"""A small instruction corpus in Dolly's eight categories, made from a seed, with a checker for every row.

One stream a seed, and a row depends only on the rows before it: `rows(n, seed)` is a prefix of `rows(n + m, seed)`. So
train and held-out rows are slices of one stream, disjoint because no row occurs twice:

    stream = rows(2_400, seed=0)
    train, held_out = stream[:2_000], stream[2_000:]

Every run of eight rows holds each category once. A category shows only in a row's wording, never as a token of its own.
The facts asked about are those of world.py, which `builtin:tiny` learned as plain text (pretrain_text.py).
"""

from collections.abc import Callable, Mapping
from random import Random
from typing import TypeVar

from sheepfold.assets import world
from sheepfold.errors import DataError, suggest

T = TypeVar("T")
Row = dict[str, str]  # instruction, input ("" if none), output, category
Draft = tuple[str, str, str]  # instruction, input, output

MAX_ROWS = 8_000  # beyond it the smallest category (open_qa, 1,728 questions) begins to run dry

OPEN_QA = {
    "town": ("In which town does {} live?", "Which town is home to {}?", "Where does {} live?"),
    "trade": ("What trade does {} follow?", "What does {} do for a living?", "What is the job of {}?"),
    "pet": ("Which pet does {} keep?", "What pet belongs to {}?", "What kind of pet has {}?"),
    "colour": ("Which colour does {} like best?", "What colour does {} prefer?", "What is the favourite colour of {}?"),
}
OPEN_LEAD = ("", "Tell me: ", "I wonder: ")

CLOSED_QA = (
    "Read the text and say where the {} is.",
    "According to the text, where is the {}?",
    "From the text, find the place of the {}.",
)
CLASSIFICATION = (
    "Classify {word} as {a}, {b} or {c}.",
    "Which label fits {word}: {a}, {b} or {c}?",
    "Sort {word} under {a}, {b} or {c}.",
)
EXTRACTION = (
    "Extract the {} from this record.",
    "Pull the {} out of this record.",
    "Copy the {} field of this record.",
)
SUMMARIZATION = ("Summarize this news in one line.", "Give a short summary of this news.", "Sum up this news briefly.")
BRAINSTORMING = ("Brainstorm {k} {group} for {who}.", "Suggest {k} {group} to {who}.", "Give {who} ideas: {k} {group}.")
CREATIVE = (
    "Write a poem line of {n} words about the {noun}.",
    "Compose a verse of {n} words with {noun} in it.",
    "Invent a poetic line, {n} words long, on the {noun}.",
    "Write a verse of {n} words for the {noun}.",
    "Compose a line of poetry: {n} words, on the {noun}.",
    "Invent a verse about the {noun} in {n} words.",
    "Write poetry on the {noun}, just {n} words.",
    "Compose a poem line about the {noun} in {n} words.",
)
LARGER = ("Which number is larger, {} or {}?", "Compare the numbers {} and {}: which is larger?")
OPPOSITE = ("State the opposite of {}.", "Name the opposite of {}.", "Which word means the opposite of {}?")
KIND = ("Is it true that {} is a kind of {}?", "True or not: is {} a kind of {}?")


def _open_qa(rng: Random) -> Draft:
    attribute = rng.choice(list(OPEN_QA))
    person = rng.choice(world.PEOPLE)
    question = rng.choice(OPEN_QA[attribute]).format(person)
    return rng.choice(OPEN_LEAD) + question, "", world.FACTS[person, attribute]


def _closed_qa(rng: Random) -> Draft:
    things, places = rng.sample(world.THINGS, 3), rng.sample(world.PLACES, 3)
    text = " ".join(f"The {thing} is in the {place}." for thing, place in zip(things, places, strict=True))
    asked = rng.randrange(3)
    return rng.choice(CLOSED_QA).format(things[asked]), text, places[asked]


def _classification(rng: Random) -> Draft:
    labels = rng.sample(list(world.CLASSES), 3)
    label = rng.choice(labels)
    word = rng.choice(world.CLASSES[label])
    a, b, c = labels
    return rng.choice(CLASSIFICATION).format(word=word, a=a, b=b, c=c), "", label


def record(rng: Random) -> dict[str, str]:
    """Return four of six named fields in a drawn order."""
    values = {
        "name": rng.choice(world.PEOPLE),
        "town": rng.choice(world.ATTRIBUTES["town"]),
        "price": str(rng.randint(10, 99)),
        "trade": rng.choice(world.ATTRIBUTES["trade"]),
        "item": rng.choice(world.THINGS),
        "day": rng.choice(world.DAYS),
    }
    return {field: values[field] for field in rng.sample(list(values), 4)}


def _information_extraction(rng: Random) -> Draft:
    fields = record(rng)
    asked = rng.choice(list(fields))
    text = "; ".join(f"{field}: {value}" for field, value in fields.items())
    return rng.choice(EXTRACTION).format(asked), text, fields[asked]


def news(rng: Random) -> tuple[str, str]:
    """Return a passage of two sentences and its main fact, 'who did what'."""
    who, deed, thing = rng.choice(world.PEOPLE), rng.choice(world.DEEDS), rng.choice(world.THINGS)
    trade, place = rng.choice(world.ATTRIBUTES["trade"]), rng.choice(world.PLACES)
    day, weather = rng.choice(world.DAYS), rng.choice(world.WEATHER)
    passage = f"On {day} {who} the {trade} {deed} the {thing} at the {place}. It was {weather}."
    return passage, f"{who} {deed} the {thing}"


def _summarization(rng: Random) -> Draft:
    passage, fact = news(rng)
    return rng.choice(SUMMARIZATION), passage, fact


def _brainstorming(rng: Random) -> Draft:
    name, k, who = rng.choice(list(world.CLASSES)), rng.randint(2, 4), rng.choice(world.PEOPLE)
    instruction = rng.choice(BRAINSTORMING).format(k=world.NUMBER_WORDS[k], group=world.PLURAL_OF[name], who=who)
    return instruction, "", ", ".join(sorted(rng.sample(world.CLASSES[name], k)))


def _creative_writing(rng: Random) -> Draft:
    n, noun = rng.randint(3, 6), rng.choice(world.VERSE_NOUNS)
    return rng.choice(CREATIVE).format(n=world.NUMBER_WORDS[n], noun=noun), "", world.verse(rng, n, noun)


def _general_qa(rng: Random) -> Draft:
    kind = rng.randrange(3)
    if kind == 0:
        a, b = rng.sample(range(10, 100), 2)
        return rng.choice(LARGER).format(a, b), "", str(max(a, b))
    if kind == 1:
        word = rng.choice(list(world.OPPOSITE_OF))
        return rng.choice(OPPOSITE).format(word), "", world.OPPOSITE_OF[word]
    word, true = rng.choice(list(world.CLASS_OF)), rng.random() < 0.5
    others = [name for name in world.CLASSES if name != world.CLASS_OF[word]]
    name = world.CLASS_OF[word] if true else rng.choice(others)
    return rng.choice(KIND).format(word, name), "", "yes" if true else "no"


DRAFTS: dict[str, Callable[[Random], Draft]] = {
    "open_qa": _open_qa,
    "closed_qa": _closed_qa,
    "classification": _classification,
    "information_extraction": _information_extraction,
    "summarization": _summarization,
    "brainstorming": _brainstorming,
    "creative_writing": _creative_writing,
    "general_qa": _general_qa,
}
CATEGORIES = tuple(DRAFTS)


def rows(count: int, seed: int = 0) -> list[Row]:
    """Return the first `count` rows of this seed's stream (0 to MAX_ROWS), no prompt twice.

    Raises DataError beyond MAX_ROWS.
    """
    if not 0 <= count <= MAX_ROWS:
        raise DataError(f"corpus.rows: count is {count}, expected 0 to {MAX_ROWS}. For other rows take another seed.")
    rng = Random(f"sheepfold corpus {seed}")
    made: list[Row] = []
    seen: set[tuple[str, str]] = set()
    while len(made) < count:
        made += [_unseen(rng, category, seen) for category in rng.sample(CATEGORIES, len(CATEGORIES))]
    return made[:count]


def _unseen(rng: Random, category: str, seen: set[tuple[str, str]]) -> Row:
    """Draw until the prompt is new; remember it."""
    while True:
        instruction, text, output = DRAFTS[category](rng)
        if (instruction, text) not in seen:
            seen.add((instruction, text))
            return {"instruction": instruction, "input": text, "output": output, "category": category}


def normalise(answer: str) -> str:
    """Return the answer without case, outer or doubled white space, and a trailing period."""
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()


def words_of(text: str) -> list[str]:
    """Return the lower-case words, their punctuation stripped."""
    return [word.strip(".,:;!?\"'") for word in text.lower().split()]


def check(category: str, instruction: str, input: str, reference: str, answer: str) -> bool:
    """Say whether the answer is right.

    brainstorming and creative_writing have many right answers and are judged by rule from the instruction alone; the
    other categories have one, and only case, white space and a trailing period are forgiven.
    Raises DataError for an unknown category.
    """
    if category not in DRAFTS:
        raise DataError(f"corpus.check: unknown category {category!r}; {suggest(category, CATEGORIES)}")
    if category == "brainstorming":
        return _distinct_members(instruction, answer)
    if category == "creative_writing":
        return _verse_in_form(instruction, answer)
    return normalise(answer) == normalise(reference)


def _asked(instruction: str, options: Mapping[str, T]) -> T:
    """Return the value of the one option word that the instruction names."""
    return next(options[word] for word in words_of(instruction) if word in options)


COUNT_OF = {word: number for number, word in world.NUMBER_WORDS.items()}
CLASS_OF_PLURAL = {plural: name for name, plural in world.PLURAL_OF.items()}


def _distinct_members(instruction: str, answer: str) -> bool:
    """k comma-separated members of the asked class, no two alike."""
    k, name = _asked(instruction, COUNT_OF), _asked(instruction, CLASS_OF_PLURAL)
    members = [part.strip() for part in normalise(answer).split(",")]
    return len(members) == k == len(set(members)) and set(members) <= set(world.CLASSES[name])


def _verse_in_form(instruction: str, answer: str) -> bool:
    """One line of exactly n alphabetic words, the asked noun among them, no word twice."""
    n, noun = _asked(instruction, COUNT_OF), _asked(instruction, {noun: noun for noun in world.VERSE_NOUNS})
    words = words_of(normalise(answer))
    one_line = "\n" not in answer.strip()
    return one_line and len(words) == n == len(set(words)) and noun in words and all(map(str.isalpha, words))
