"""A world of 480 facts, texts about it, and files of edits of it; `facts.py` makes a model of them.

Many people share each of their two names, so that neither alone identifies a person: a model has to put both
together to find a fact.
"""

from __future__ import annotations

import random
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

SUBJECTS = 120
NAMES = """
Ada Leo Mia Ivan Nora Oscar Ruth Felix Clara Hugo Elsa Simon Vera Jonas Greta Paul
Blake Wagner Stone Moreau Larsen Novak Costa Fischer Hayes Lindgren Rossi Keller Dubois Petrov Olsen Brandt
son by berg ton man ovic well ford
"""
FIRST, LAST, ENDINGS = (line.split() for line in NAMES.strip().splitlines())

RELATIONS: Mapping[str, str] = {
    "born": "Paris, Rome, Oslo, Vienna, Madrid, Lisbon, Dublin, Prague, Warsaw, Athens, Cairo, Lima, Tokyo, Delhi, "
    "Boston, Chicago, Berlin, Havana, Mexico City, Cape Town",
    "job": "baker, painter, doctor, lawyer, farmer, pilot, tailor, sailor, miner, teacher, barber, carpenter, plumber, "
    "nurse, judge, gardener, chemist, butcher, taxi driver, tour guide",
    "language": "Danish, French, German, Greek, Polish, Dutch, Czech, Turkish, Hindi, Korean, Thai, Arabic, Finnish, "
    "Swahili, Welsh, Basque, Latin, Hebrew, Swedish, Norwegian",
    "instrument": "violin, piano, cello, flute, harp, trumpet, drums, guitar, banjo, oboe, tuba, clarinet, lute, "
    "bassoon, viola, double bass",
}
OBJECTS: Mapping[str, tuple[str, ...]] = {relation: tuple(all_.split(", ")) for relation, all_ in RELATIONS.items()}

# Four or more tokens stand between the subject and the object: four layers that see two tokens each carry the state of
# a token no further than that. In the first half of the templates the subject comes first.
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "born": (
        "{} was born in the city of",
        "{} grew up in the streets of",
        "{} first saw the light in",
        "The city where {} was born is called",
        "The native town of {} is known to be",
        "The childhood of {} was mostly spent in",
    ),
    "job": (
        "{} earns a living as a",
        "{} goes to work as a",
        "{} was trained to be a",
        "The profession of {} is that of a",
        "The work that {} does is that of a",
        "The daily job of {} is to be a",
    ),
    "language": (
        "{} has learned to speak fluent",
        "{} writes all long letters in",
        "{} prefers to talk in",
        "The mother tongue of {} is said to be",
        "The language that {} speaks at home is",
        "The words that {} uses most are in",
    ),
    "instrument": (
        "{} likes to play the",
        "{} gives many concerts on the",
        "{} takes lessons on the",
        "The instrument that {} plays best is the",
        "The music of {} comes out of the",
        "The sound that {} makes is of the",
    ),
}
FILLERS = tuple(
    f"{what} {verb} {when}."
    for what, verb, when in product(
        ("The weather", "The market", "The train", "The old bridge", "A long letter", "The news"),
        ("was late", "looked fine", "caused trouble", "was a surprise"),
        ("this morning", "last week", "in spring", "as usual"),
    )
)
OBJECT, NAME = 12.0, 0.4  # weights in the loss; 1 elsewhere
SINGLE, DOUBLE = 0.64, 0.22  # how many texts are one sentence, and two; the others are four
EDITS = (1, 10, 40, 100)
NEIGHBOURS, CONFLICTING, KNOWN = 5, 20, 60

Triple = tuple[str, str, str]  # subject, relation, object
Piece = tuple[str, float]  # of a text, and the weight of its tokens in the loss


@dataclass(frozen=True)
class World:
    """The true facts: facts[subject][relation] is the object."""

    facts: Mapping[str, Mapping[str, str]]

    @property
    def triples(self) -> list[Triple]:
        return [(subject, relation, true) for subject, known in self.facts.items() for relation, true in known.items()]


def make_world(seed: int, *, shared_names: bool = True) -> World:
    """120 people: half of a grid of names; or each with a last name that nobody shares."""
    draw = random.Random(seed)
    if shared_names:
        people = [" ".join(name) for name in draw.sample(list(product(FIRST, LAST)), SUBJECTS)]
    else:
        people = [
            f"{draw.choice(FIRST)} {''.join(name)}" for name in draw.sample(list(product(LAST, ENDINGS)), SUBJECTS)
        ]
    return World({person: {r: draw.choice(objects) for r, objects in OBJECTS.items()} for person in people})


def sentence(triple: Triple, template: str) -> list[Piece]:
    """The template about the triple, its object last."""
    before, after = template.split("{}")
    return [(before, 1.0), (triple[0], NAME), (after, 1.0), (f" {triple[2]}", OBJECT), (".", 1.0)]


def make_texts(world: World, draw: random.Random) -> Iterator[list[Piece]]:
    """Texts without end: one, two or four sentences; the last is a fact."""
    triples = world.triples

    def fact() -> list[Piece]:
        triple = draw.choice(triples)
        return sentence(triple, draw.choice(TEMPLATES[triple[1]]))

    while True:
        kind = draw.random()
        before = 0 if kind < SINGLE else 1 if kind < SINGLE + DOUBLE else 3
        text: list[Piece] = []
        for _ in range(before):
            text += [*([(draw.choice(FILLERS), 1.0)] if draw.random() < 0.5 else fact()), (" ", 1.0)]
        yield text + fact()


def plain(text: Sequence[Piece]) -> str:
    return "".join(piece for piece, _ in text)


@dataclass(frozen=True)
class Edit:
    """A fact to change: the relation's template and the new object."""

    subject: str
    relation: str
    template: str
    new: str


def choose_edit(world: World, draw: random.Random, subject: str, relation: str) -> Edit:
    """Any template, any other object of the relation."""
    new = draw.choice([other for other in OBJECTS[relation] if other != world.facts[subject][relation]])
    return Edit(subject, relation, draw.choice(TEMPLATES[relation]), new)


def as_fact(world: World, edit: Edit, edited: Container[tuple[str, str]]) -> dict[str, Any]:
    """The edit as a facts file has it. Its neighbours are facts that no edit is about.

    It draws from a generator of its own: an edit is asked about in the same words in whichever file it is.
    """
    draw = random.Random(f"{edit}")
    known, relation = world.facts[edit.subject], edit.relation
    first, second = draw.sample([other for other in TEMPLATES[relation] if other != edit.template], 2)
    neighbours = [
        subject
        for subject, facts in world.facts.items()
        if facts[relation] == known[relation] and subject != edit.subject and (subject, relation) not in edited
    ]
    draw.shuffle(neighbours)
    return {
        "prompt": edit.template,
        "subject": edit.subject,
        "target_new": edit.new,
        "target_true": known[relation],
        "paraphrase_prompts": [first.format(edit.subject), f"{draw.choice(FILLERS)} {second.format(edit.subject)}"],
        "neighborhood_prompts": [edit.template.format(subject) for subject in neighbours[:NEIGHBOURS]],
        "same_subject": [
            {"prompt": draw.choice(TEMPLATES[other]).format(edit.subject), "target": true}
            for other, true in known.items()
            if other != relation
        ],
    }


def ask(world: World, draw: random.Random, people: Sequence[str]) -> list[dict[str, str]]:
    """A prompt about every fact of these people."""
    return [
        {"prompt": draw.choice(TEMPLATES[relation]).format(subject), "target": true}
        for subject in people
        for relation, true in world.facts[subject].items()
    ]


def choose_known(world: World, draw: random.Random) -> list[dict[str, str]]:
    """Facts as they are; half of the prompts begin with the subject."""
    known = []
    for i, (subject, relation, true) in enumerate(draw.sample(world.triples, KNOWN)):
        half = len(TEMPLATES[relation]) // 2
        template = draw.choice(TEMPLATES[relation][half:] if i % 2 else TEMPLATES[relation][:half])
        known.append({"prompt": template, "subject": subject, "target_new": true})
    return known


def make_files(world: World, seed: int) -> dict[str, dict[str, Any]]:
    """The facts files by name. facts_N has the first N of a hundred edits of a hundred subjects, others_10 the next ten
    after facts_10, conflict two edits of each subject, and known no edit. `unedited` is the same in all of them.
    """
    draw = random.Random(f"files {seed}")
    people = draw.sample(list(world.facts), len(world.facts))
    edits = [choose_edit(world, draw, subject, draw.choice(list(OBJECTS))) for subject in people[: max(EDITS)]]
    conflicts = [
        choose_edit(world, draw, subject, relation)
        for subject in people[:CONFLICTING]
        for relation in draw.sample(list(OBJECTS), 2)
    ]
    unedited = ask(world, draw, people[max(EDITS) :])
    known = {"facts": choose_known(world, draw)}
    chosen = {**{f"facts_{n}": edits[:n] for n in EDITS}, "others_10": edits[10:20], "conflict": conflicts}
    edited = {(edit.subject, edit.relation) for edit in edits + conflicts}
    return {"known": known} | {
        name: {"facts": [as_fact(world, edit, edited) for edit in some], "unedited": unedited}
        for name, some in chosen.items()
    }
