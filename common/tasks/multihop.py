"""Questions about a few short documents: one or two facts have to be found (difficulty 1 or 2).

With `quote` the answer quotes the sentences that it rests on, as a retrieval-augmented assistant does; without, it is
a short reply in other words than the document's. People, places and dates are invented by drawing from lists.
"""

from __future__ import annotations

import re
from random import Random

from common.tasks.problem import Problem, distinct_problems

FIRST = """
Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karin Louis Maria Nadia Oscar Paula Quentin Rosa
Simon Tessa Ulrich Vera Walter Xenia Yusuf Zora Alma Bruno Celia Dario
""".split()  # noqa: SIM905
LAST = """
Abel Berg Costa Drake Engel Falk Grant Holt Ivers Jansen Keller Lund Marsh Novak Olsen Price Quist Rossi Stone
Thorn Unger Vogel Weber Young Zeller Arnold Bishop Carter Dunn Ellis
""".split()  # noqa: SIM905
PLACES = """
Arden Belmont Corvo Dalby Elmira Farrow Galway Harlow Imola Jasper Kelso Lisbon Moira Norden Orsova Perth Quorn
Ravenna Sorrel Tarbert Ulm Varna Wexford Yarrow Zadar Ancona Bergen Calder Dover Exeter
""".split()  # noqa: SIM905
JOBS = """
doctor baker teacher painter lawyer printer farmer singer builder tailor clerk sailor nurse judge weaver
""".split()  # noqa: SIM905
SUBJECTS = """
music law physics history medicine botany chemistry poetry logic geology
""".split()  # noqa: SIM905
GOODS = """
cheese glass silk wine paper salt honey bells ships clocks wool roses bread lace tea
""".split()  # noqa: SIM905
RIVERS = """
Alna Brenta Clyde Drava Elbe Frome Garda Isar Lenta Mura Narew Oder
""".split()  # noqa: SIM905
BUILDINGS = """
bridge tower library market theatre harbour museum castle mill station
""".split()  # noqa: SIM905
MONTHS = """
January February March April May June July August September October November December
""".split()  # noqa: SIM905

# relation: (sentences, question, where the answer stands, short replies in other words). Sentences begin with whom or
# what they are about and their prepositions differ, so that a small model can learn to find and copy the right one.
PEOPLE = {
    "birth": (
        ("{p} was born at {c} one {m} morning.", "{p} was born at {c}.", "{p} was born at {c} during a storm."),
        "Where was {p} born?",
        "c",
        ("It all began for them in {c}.", "A native of {c}.", "{c} is their home town."),
    ),
    "work": (
        ("{p} served as {j} until {m}.", "{p} served as {j} for many years.", "{p} served as {j}."),
        "What did {p} serve as?",
        "j",
        ("By trade a {j}.", "They earned a living as {j}.", "A {j}, it seems."),
    ),
    "study": (
        ("{p} studied {s} since {m}.", "{p} studied {s} with great success.", "{p} studied {s}."),
        "What was it that {p} studied?",
        "s",
        ("Their field was {s}.", "Courses in {s}.", "They took a degree in {s}."),
    ),
    "move": (
        ("{p} moved to {c} last {m}.", "{p} moved to {c} by train.", "{p} moved to {c}."),
        "Where was it that {p} moved to?",
        "c",
        ("Their new home was {c}.", "They settled down in {c}.", "Off to {c}."),
    ),
}
TOWNS = {
    "goods": (
        ("{c} is famous for {g}.", "{c} is famous for {g} and songs.", "{c} is famous for {g} sold every {m}."),
        "What is {c} famous for?",
        "What is the town where {p} {was} famous for?",
        "g",
        ("People come to buy the {g}.", "Mostly {g}.", "Its name stands for good {g}."),
    ),
    "river": (
        (
            "{c} lies on the river {r}.",
            "{c} lies on the river {r} near hills.",
            "{c} lies on the river {r}, dry by {m}.",
        ),
        "Which river is it that {c} lies on?",
        "Which river is it that the town where {p} {was} lies on?",
        "r",
        ("The {r} flows by.", "You can see the {r} there.", "That would be the {r}."),
    ),
    "building": (
        ("{c} has an old {b}.", "{c} has an old {b}, shut after {m}.", "{c} has an old {b} beside its square."),
        "What old building is it that {c} has?",
        "What old building is it that the town where {p} {was} has?",
        "b",
        ("Visitors go to see its {b}.", "A {b}.", "There stands a historic {b}."),
    ),
}
BRIDGES = {"birth": "was born", "move": "moved to"}  # the facts about people that name a town


def generate(
    seed: int, n: int, difficulty: int | tuple[int, int] = (1, 2), split: str = "train", *, quote: bool = True
) -> list[Problem]:
    """n different problems of one split. difficulty: facts needed, 1 or 2, or the range (1, 2). quote: see the module.

    Raises ValueError for another difficulty.
    """
    low, high = (difficulty, difficulty) if isinstance(difficulty, int) else difficulty
    if not 1 <= low <= high <= 2:
        raise ValueError(f"difficulty must be 1 or 2, not {difficulty}")
    return distinct_problems(lambda random: _draw(random, random.randint(low, high), quote), seed, n, split)


def _draw(random: Random, facts: int, quote: bool) -> Problem:
    bridge = random.choice(list(BRIDGES))
    person, town, told, notes = _documents(random, bridge)
    if facts == 1:
        subject, name = random.choice(list(told))
        relation = (PEOPLE | TOWNS)[name]
        question = relation[1].format(p=subject, c=subject)
        sources = [told[subject, name]]
    else:
        name = random.choice([name for subject, name in told if subject == town])
        relation = TOWNS[name]
        question = relation[2].format(p=person, was=BRIDGES[bridge])
        sources = [told[person, bridge], told[town, name]]
    result = sources[-1][1]
    if quote:
        answer = f" The notes say: {' '.join(sentence for sentence, _ in sources)} So the answer is {result}."
    else:
        answer = " " + random.choice(relation[-1]).format(**{relation[-2]: result})
    wish = "Quote the text." if quote else "Answer in your own words."
    prompt = f"{notes}\nQuestion: {question} {wish}\nAnswer:"
    return Problem("multihop" if quote else "multihop_short", "", prompt, answer, result, facts)


def _documents(random: Random, bridge: str) -> tuple[str, str, dict[tuple[str, str], tuple[str, str]], str]:
    """A person, the town that the bridge leads to, and another person or town; no relation occurs twice.

    Returns person, town, (subject, relation) -> (sentence, fact), and the text.
    """
    people = [f"{first} {last}" for first, last in zip(random.sample(FIRST, 2), random.sample(LAST, 2), strict=True)]
    towns = random.sample(PLACES, 4)
    other = random.choice([name for name in PEOPLE if name != bridge])
    of_town = random.sample(list(TOWNS), 3)
    relations = {people[0]: [bridge, other], towns[0]: of_town[:2]}
    if random.random() < 0.5:
        relations[people[1]] = [name for name in PEOPLE if name not in (bridge, other)]
    else:
        relations[towns[1]] = of_town[2:]
    told, lines = {}, []
    for subject, names in relations.items():
        random.shuffle(names)
        for name in names:
            if subject in people:
                place = towns[0] if name == bridge else towns[2 + people.index(subject)]
                told[subject, name] = _fact(random, PEOPLE[name], p=subject, c=place)
            else:
                told[subject, name] = _fact(random, TOWNS[name], c=subject)
        lines.append("- " + " ".join(told[subject, name][0] for name in names))
    random.shuffle(lines)
    return people[0], towns[0], told, "\n".join(lines)


def _fact(random: Random, relation: tuple, **known: str) -> tuple[str, str]:
    """A sentence and what a question about it asks for."""
    values = {
        "j": random.choice(JOBS),
        "s": random.choice(SUBJECTS),
        "g": random.choice(GOODS),
        "r": random.choice(RIVERS),
        "b": random.choice(BUILDINGS),
        "m": random.choice(MONTHS),
        **known,
    }
    return random.choice(relation[0]).format(**values), values[relation[-2]]


def result_of(problem: Problem, text: str) -> str | None:
    """What the text answers: the words after 'the answer is', or for short answers the right word if it is used."""
    if problem.task == "multihop_short":
        return problem.result if re.search(rf"\b{re.escape(problem.result)}\b", text) else None
    found = re.search(r" So the answer is (\w+)\.", text)
    return found.group(1) if found else None


def verify(problem: Problem, text: str) -> bool:
    """Whether the generated text gives the right answer."""
    return result_of(problem, text) == problem.result


def quotes_of(text: str) -> list[str]:
    """The sentences that an answer quotes, in order."""
    found = re.search(r"The notes say: (.*) So the answer is", text)
    return _sentences(found.group(1)) if found else []


def quotes_are_verbatim(problem: Problem, text: str) -> bool:
    """Whether the text quotes at least once and each quotation is one whole sentence of the documents."""
    notes = problem.prompt.partition("\nQuestion:")[0]
    told = {sentence for line in notes.splitlines() for sentence in _sentences(line.removeprefix("- "))}
    quotes = quotes_of(text)
    return bool(quotes) and told.issuperset(quotes)


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", text)
