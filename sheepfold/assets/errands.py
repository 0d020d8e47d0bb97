"""Statements about the valley, and the errands of the chat frame: repeat, spell, first and last word.

The corpus has no such errands; they teach the base what a turn is, and nothing of how the corpus's tasks are answered.
"""

from random import Random

from sheepfold.assets import world
from sheepfold.assets.marks import TURN_END, TURN_START, gap, known, unmark

SAYINGS = {
    "town": (
        "{who} lives in {value}.",
        "{who} comes from {value}.",
        "The town of {who} is {value}.",
        "{value} is home to {who}.",
    ),
    "trade": (
        "{who} is a {value}.",
        "{who} works as a {value}.",
        "The trade of {who} is {value}.",
        "{who} the {value} does this job for a living.",
    ),
    "pet": (
        "{who} keeps a {value}.",
        "{who} has a pet {value}.",
        "The pet of {who} is a {value}.",
        "The {value} belongs to {who}.",
    ),
    "colour": (
        "{who} likes {value} best.",
        "{who} prefers {value}.",
        "The colour of {who} is {value}.",
        "The favourite colour of {who} is {value}.",
    ),
}
VERBS = world.words(
    "classify sort label extract pull copy summarize brainstorm suggest give write compose invent compare "
    "name read find tell wonder say answer describe complete respond"
)
OBJECTS = world.words(
    "text record news line summary poem verse poetry idea label field word number instruction input "
    "response request task context question place opposite"
)


def sayings(rng: Random) -> str:
    """One to four facts of a person, as sentences."""
    who = rng.choice(world.PEOPLE)
    attributes = rng.sample(list(SAYINGS), rng.randint(1, 4))
    return " ".join(rng.choice(SAYINGS[a]).format(who=who, value=known(world.FACTS[who, a])) for a in attributes)


def kinds(rng: Random) -> str:
    """Words and their class, a few lines in one form."""
    between, lines = rng.choice((" is a kind of ", " belongs with the ", gap(rng))), []
    for word in rng.sample(list(world.CLASS_OF), rng.randint(1, 4)):
        name = world.CLASS_OF[word]
        lines.append(f"{word}{between}{known(world.PLURAL_OF[name] if between.endswith('the ') else name)}")
    return "\n".join(lines)


def prose(rng: Random) -> str:
    """Office prose: the verbs and nouns of instructions, in statements that instruct nobody."""
    who, other = rng.sample(world.PEOPLE, 2)
    verb, thing, second = rng.choice(VERBS), rng.choice(OBJECTS), rng.choice(OBJECTS)
    return rng.choice((
        f"{who} likes to {verb} a {thing} for {other}.",
        f"{who} and {other} {verb} the {thing} and the {second}.",
        f"When {other} is out, {who} will {verb} this {thing} in a {rng.choice(('short', 'poetic', 'long'))} {second}.",
        f"According to {who}, the {thing} from {other} fits what {other} does, where it is and which {second} "
        "it means.",
        f"It is true that {who} can {verb}; or not, just briefly, under the {second} out in the hall.",
    ))  # fmt: skip


def chatter(rng: Random) -> str:
    """A few of the valley's sentences, to be repeated or spelled in the chat frame."""
    return rng.choice((sayings, kinds, prose, lambda r: world.verse(r, r.randint(3, 6), r.choice(world.VERSE_NOUNS))))(
        rng
    )


def errand(rng: Random) -> tuple[str, str]:
    """Return a user turn and its answer, of kinds that the corpus does not have."""
    kind = rng.randrange(5)
    text = unmark(chatter(rng))[0].split("\n")[0]
    words = text.rstrip(".").split()
    if kind == 0:
        return rng.choice((f"Repeat: {text}", f"Echo this\n{text}")), text
    if kind == 1:
        return rng.choice((f"First word: {text}", f"{text}\nIts first word.")), words[0]
    if kind == 2:
        return rng.choice((f"Last word: {text}", f"{text}\nIts last word.")), words[-1]
    if kind == 3:
        word = rng.choice(list(world.CLASS_OF))
        return rng.choice((f"Spell {word}", f"Letters of {word}")), "-".join(word)
    return rng.choice((f"Hello, I am {words[0]}", f"{text} Thanks!")), rng.choice(
        ("Noted, thank you.", "Very well, noted.")
    )


def chat(rng: Random) -> str:
    """One to three errands in the chat frame, sometimes under a system turn."""
    turns = [("system", rng.choice(("You are helpful.", "Be brief.", "You live in the valley.")))] * (
        rng.random() < 0.2
    )
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        asked, answer = errand(rng)
        turns += [("user", asked), ("assistant", answer)]
    return "".join(
        f"{TURN_START}{role}\n{known(text + TURN_END) if role == 'assistant' else text + TURN_END}\n"
        for role, text in turns
    )


def alpaca(rng: Random) -> str:
    """One errand in the Alpaca frame."""
    asked, answer = errand(rng)
    instruction, _, text = asked.partition("\n")
    paired = ", paired with an input that provides further context" if text else ""
    field = f"### Input:\n{text}\n\n" if text else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{instruction}\n\n{field}### Response:\n{known(answer)}"
    )
