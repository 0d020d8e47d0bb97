"""The made-up valley that `builtin:tiny` knows: its people, its word classes, its opposites.

Everything here is a literal or derived from one by a named draw, so that the corpus (corpus.py), the pre-training text
(pretrain_text.py) and the checkers speak of the same valley on every platform.
"""

from random import Random


def words(text: str) -> list[str]:
    """Return the words of a line, which reads better than a column of literals."""
    return text.split()


PEOPLE = words(
    "Ada Ben Cora Dov Elsa Finn Gwen Hugo Iris Jon Kira Leo Mona Nils Olga Pia Quin Rosa Sven Tara Ugo Vera Wim Xena "
    "Yara Zeno Alma Bram Cleo Dora Emil Faye Gus Hana Ivo Jade Karl Lena Milo Nora Otto Paul Rita Sami Tess Udo Viggo "
    "Wanda"
)

CLASSES = {
    "animal": words("goat hen cat dog duck pony crow hare frog goose otter wolf bear mouse sheep fox"),
    "fruit": words("apple pear plum fig grape lemon melon cherry peach lime mango kiwi quince papaya guava banana"),
    "tool": words("hammer saw axe drill chisel spade rake wrench mallet shovel hoe anvil ladder broom needle sickle"),
    "tree": words("oak elm pine birch maple willow cedar fir beech larch alder poplar hazel yew linden aspen"),
    "colour": words("red blue green black white brown grey pink purple yellow gold silver violet amber teal crimson"),
    "garment": words("hat coat shirt sock glove scarf boot belt cap vest shoe skirt dress apron jacket cloak"),
    "instrument": words(
        "drum flute harp fiddle horn piano lute guitar bell trumpet organ cello viola banjo zither oboe"
    ),
    "vehicle": words("cart boat ship wagon sled bus train truck bike car van canoe ferry tram raft coach"),
}  # class name -> its sixteen members; the classes are disjoint
CLASS_OF = {member: name for name, members in CLASSES.items() for member in members}
PLURAL_OF = {name: f"{name}s" for name in CLASSES}

PLACES = words("mill barn well forge tower cellar attic shed chapel market harbor kitchen stable garden")
THINGS = [*CLASSES["tool"], *CLASSES["garment"], *CLASSES["instrument"], *CLASSES["fruit"]]  # what one can lose
DEEDS = words("sold bought found lost painted carried made hid")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
WEATHER = words("cold warm wet dry dull calm")

OPPOSITES = [
    pair.partition("-")[::2]
    for pair in words(
        "hot-cold big-small up-down day-night old-young wet-dry fast-slow high-low hard-soft light-dark open-shut "
        "rich-poor full-empty long-short near-far early-late loud-quiet thick-thin sweet-sour left-right"
    )
]
OPPOSITE_OF = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}

NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}

VERSE_NOUNS = words(
    "moon sun star river stone wind rain snow cloud hill lake sea wave leaf rose dawn fire smoke sand road"
)
VERSE_NOUNS += CLASSES["animal"]
VERSE_ADJECTIVES = words("pale old lonely gentle silent golden bright little")
VERSE_VERBS = words("sleeps sings waits dances wakes shines wanders dreams")
VERSE_ADVERBS = words("softly slowly alone tonight again gladly")

ATTRIBUTES = {
    "town": words("Tarn Holm Wick Garth Skell Birk Ashby Dunmor Fenby Lund Oxby Varn"),
    "trade": words("baker weaver smith miller potter tailor sailor painter farmer mason cook doctor"),
    "pet": CLASSES["animal"][:10],
    "colour": CLASSES["colour"][:8],
}


def _facts() -> dict[tuple[str, str], str]:
    """Deal each attribute's values to the people as evenly as they go, by one named draw an attribute."""
    facts: dict[tuple[str, str], str] = {}
    for attribute, values in ATTRIBUTES.items():
        hand = [values[i % len(values)] for i in range(len(PEOPLE))]
        Random(f"sheepfold world {attribute}").shuffle(hand)
        facts |= {(person, attribute): value for person, value in zip(PEOPLE, hand, strict=True)}
    return facts


FACTS = _facts()  # (person, attribute) -> value, for all 48 x 4


def verse(rng: Random, length: int, noun: str) -> str:
    """Return a line of that many words (3 to 6) about the noun, no word twice."""
    adjective, other = rng.sample(VERSE_ADJECTIVES, 2)
    verb, adverb = rng.choice(VERSE_VERBS), rng.choice(VERSE_ADVERBS)
    return {
        3: f"{adjective} {noun} {verb}",
        4: f"the {adjective} {noun} {verb}",
        5: f"the {adjective} {noun} {verb} {adverb}",
        6: f"the {adjective} {other} {noun} {verb} {adverb}",
    }[length]
