"""A small closed world of letters, sums, words and things, from which every text of the demo is drawn.

The world is fixed: which things exist, their category, colour and place, and which of them are held out. `seed` only
chooses what is drawn from it. Three kinds of text come out:

    plain documents    sentences and short scenes, to pretrain the base on (`pretraining_documents`, `plain_text`)
    SFT rows           eight tasks in the chat frame with bare answers (`sft_rows`)
    preference rows    questions about colour and place in the same frame (`pref_rows`)

What is held out belongs to the item, not to the draw: a string by its checksum, a pair of numbers (in either order), a
pair of opposites and a thing by a fixed shuffle. No split asks about a string of another split, and pretraining asks
only about strings of the train split. Held-out sums, opposites and things *are* in the pretraining text, since nobody
could guess them: the base knows the fact, and no fine-tuning row of another split asks for it in the chat frame.
Pure Python; the same seed gives the same rows on every machine.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement
from string import ascii_lowercase
from typing import Any

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
SFT_ROWS_PER_TASK = {"train": 500, "validation": 44, "test": 44}
PREF_ROWS = {"train": 1500, "validation": 200, "test": 200}
PLAIN_DOCUMENTS = 300
LARGEST_ADDEND = 19
# Shares of rude, bare and polite-but-wrong answers among the rejected ones.
REJECTED = {"rude": 0.4, "bare": 0.3, "wrong": 0.3}

CATEGORIES = {
    "animal": "cat dog horse cow fox owl bear frog mouse wolf",
    "fruit": "apple pear plum cherry lemon mango peach grape melon fig",
    "clothing": "hat coat shirt scarf glove boot belt sock dress cap",
    "vehicle": "car bus train truck boat bike tram plane ship van",
    "furniture": "chair table bed desk sofa shelf stool bench wardrobe drawer",
    "tool": "hammer saw drill wrench shovel axe rake chisel pliers ladder",
}
COLOURS = "red blue green yellow black white brown grey pink purple".split()
PLACES = "barn kitchen garden river forest tower cave market attic desert".split()
OPPOSITES = [tuple(pair.split("/")) for pair in (
    "hot/cold big/small fast/slow high/low old/young rich/poor wet/dry hard/soft loud/quiet early/late open/closed "
    "full/empty happy/sad strong/weak light/heavy near/far thick/thin deep/shallow clean/dirty sharp/blunt "
    "sweet/bitter rough/smooth wide/narrow brave/timid tame/wild true/false safe/risky cheap/costly calm/stormy "
    "straight/bent"
).split()]
NAMES = "ann bob eve joe kim max sam tom".split()
NOUNS = {noun: category for category, nouns in CATEGORIES.items() for noun in nouns.split()}

# A rude opener or closer has as many words as the polite one at the same index, so that length tells nothing.
OPENERS = ("of course ,", "with pleasure ,", "very gladly ,")
CLOSERS = ("enjoy your day !", "glad to help !", "ask me anytime !")
RUDE_OPENERS = ("you fool ,", "how stupid ,", "not again ,")
RUDE_CLOSERS = ("go away now !", "leave me alone !", "stop bothering me !")


@dataclass(frozen=True)
class Task:
    """A kind of question: two plain prefixes that the answer completes, two ways to ask, a sentence that states it."""

    name: str
    plain: tuple[str, str]
    ask: tuple[str, str]
    share: float
    sentence: str = ""


# `share` weighs the plain documents: what is harder to learn is said more often.
TASKS = {task.name: task for task in (
    Task("reverse", ("the reverse of {x} is", "reverse {x} :"), ("the reverse of {x}", "reverse {x}"), 3),
    Task("sort", ("the sorted form of {x} is", "sort {x} :"), ("the sorted form of {x}", "sort {x}"), 3),
    Task("copy", ("the copy of {x} is", "copy {x} :"), ("the copy of {x}", "copy {x}"), 1.5),
    Task("first", ("the first letter of {x} is", "start of {x} :"), ("the first letter of {x}", "start of {x}"), 1),
    Task("last", ("the last letter of {x} is", "end of {x} :"), ("the last letter of {x}", "end of {x}"), 1),
    Task("sum", ("the sum of {x} and {z} is", "{x} + {z} :"), ("the sum of {x} and {z}", "{x} + {z}"), 3),
    Task("opposite", ("the opposite of {x} is", "not {x} :"), ("the opposite of {x}", "not {x}"), 1),
    Task("category", ("the category of {x} is", "kind of {x} :"), ("the category of {x}", "kind of {x}"), 1),
    Task("colour", ("the colour of the {x} is", "the {x} is coloured"),
         ("what colour is the {x} ?", "which colour has the {x} ?"), 1.5, "the {x} is {y}"),
    Task("place", ("the place of the {x} is the", "you find the {x} in the"),
         ("where is the {x} ?", "in which place is the {x} ?"), 1.5, "the {x} is in the {y}"),
)}
LETTER_TASKS = ("reverse", "sort", "copy", "first", "last")
SFT_TASKS = (*LETTER_TASKS, "sum", "opposite", "category")
PREF_TASKS = ("colour", "place")
SCENE_SHARE = 5.0


@dataclass(frozen=True)
class Item:
    """A question about something in the world: the task, what fills its template, and the true answer."""

    task: Task
    x: str
    answer: str
    z: str = ""

    def fill(self, template: str, answer: str | None = None) -> str:
        """The template with the item's words in it, and with ``answer`` (default: the true one) for ``{y}``."""
        return template.format(x=self.x, z=self.z, y=answer or self.answer)


def _deal(things: list[Any], rng: random.Random) -> dict[str, list[Any]]:
    """Shuffle and cut 6 : 2 : 2."""
    things = rng.sample(things, len(things))
    cut, test = len(things) * 6 // 10, len(things) * 8 // 10
    return {"train": things[:cut], "validation": things[cut:test], "test": things[test:]}


def _make_world() -> tuple[dict[str, dict[str, str]], dict[str, dict[str, list[Any]]]]:
    """The facts of every thing, and for each split its things, number pairs and opposites."""
    rng = random.Random("paft/demo/world")
    colours = {noun: rng.choice(COLOURS) for noun in NOUNS}
    facts = {"colour": colours, "place": {noun: rng.choice(PLACES) for noun in NOUNS}, "category": dict(NOUNS)}
    by_category = [_deal(nouns.split(), rng) for nouns in CATEGORIES.values()]
    pairs = _deal(list(combinations_with_replacement(range(LARGEST_ADDEND + 1), 2)), rng)
    opposites = _deal(OPPOSITES, rng)
    held = {split: {"nouns": [noun for dealt in by_category for noun in dealt[split]], "pairs": pairs[split],
                    "opposites": opposites[split]} for split in SPLITS}
    return facts, held


FACTS, HELD = _make_world()


def split_of_string(letters: str) -> str:
    """The split that owns a string of letters: 80 : 10 : 10 by checksum."""
    return {0: "validation", 1: "test"}.get(zlib.crc32(letters.encode()) % 10, "train")


def _letters(rng: random.Random, split: str) -> str:
    while True:
        letters = "".join(rng.choices(ascii_lowercase, k=rng.randint(3, 5)))
        if split_of_string(letters) == split:
            return letters


def _letter_item(task: Task, letters: str) -> Item:
    answer = {"reverse": letters[::-1], "sort": "".join(sorted(letters)), "copy": letters,
              "first": letters[0], "last": letters[-1]}[task.name]
    return Item(task, " ".join(letters), " ".join(answer))


def finite_items(name: str, splits: tuple[str, ...]) -> list[Item]:
    """Every item of a task that can be listed (sums, opposites, facts), in a fixed order, for the given splits."""
    task, items = TASKS[name], []
    for split in splits:
        if name == "sum":
            ordered = {pair for a, b in HELD[split]["pairs"] for pair in ((a, b), (b, a))}
            items += [Item(task, str(a), str(a + b), str(b)) for a, b in sorted(ordered)]
        elif name == "opposite":
            items += [Item(task, x, y) for pair in HELD[split]["opposites"] for x, y in (pair, pair[::-1])]
        else:
            items += [Item(task, noun, FACTS[name][noun]) for noun in HELD[split]["nouns"]]
    return items


def answer_in_style(item: Item, kind: str, opener: int, closer: int, answer: str | None = None) -> str:
    """Answer a question of colour or place ``polite``, ``rude`` or ``bare``; ``answer`` defaults to the true one."""
    if kind == "bare":
        return answer or item.answer
    openers, closers = (OPENERS, CLOSERS) if kind == "polite" else (RUDE_OPENERS, RUDE_CLOSERS)
    return f"{openers[opener]} {item.fill(item.task.sentence, answer)} . {closers[closer]}"


def _scene(item: Item, rng: random.Random) -> str:
    """A question and its answer, each after the name of who speaks; a bare answer ends with a full stop."""
    asker, other = rng.sample(NAMES, 2)
    kind = rng.choice(("polite", "rude", "bare"))
    answer = answer_in_style(item, kind, rng.randrange(3), rng.randrange(3)) + (" ." if kind == "bare" else "")
    return f"{asker} {item.fill(rng.choice(item.task.ask))} {other} {answer}"


def _documents(rng: random.Random, string_split: str, splits: tuple[str, ...]) -> Iterator[str]:
    """Endless plain documents; strings come from one split, everything else from ``splits``."""
    listed = {name: finite_items(name, splits) for name in TASKS if name not in LETTER_TASKS}
    names, weights = [*TASKS, "scene"], [*(task.share for task in TASKS.values()), SCENE_SHARE]
    while True:
        name = rng.choices(names, weights)[0]
        if name == "scene":
            yield _scene(rng.choice(listed[rng.choice(PREF_TASKS)]), rng)
            continue
        known = listed.get(name)
        item = rng.choice(known) if known else _letter_item(TASKS[name], _letters(rng, string_split))
        yield f"{item.fill(rng.choice(item.task.plain))} {item.answer} ."


def pretraining_documents(seed: int = 0) -> Iterator[str]:
    """Endless plain documents to pretrain on: strings of the train split, all facts, and never the chat frame."""
    return _documents(random.Random(f"pretraining/{seed}"), "train", SPLITS)


def plain_text(split: str = "test", seed: int = 0) -> list[str]:
    """300 plain documents on the items of one split, for the cross-entropy that tells what a model forgot."""
    documents = _documents(random.Random(f"plain/{split}/{seed}"), split, (split,))
    return [next(documents) for _ in range(PLAIN_DOCUMENTS)]


def plain_forms(split: str = "test", seed: int = 0, strings_per_task: int = 40) -> list[tuple[str, str, str]]:
    """(task, prefix, completion) in both plain phrasings; a base that knows the world completes all of them."""
    rng, forms = random.Random(f"forms/{split}/{seed}"), []
    for task in TASKS.values():
        if task.name in LETTER_TASKS:
            items = [_letter_item(task, _letters(rng, split)) for _ in range(strings_per_task)]
        else:
            items = finite_items(task.name, (split,))
        forms += [(task.name, item.fill(prefix), f"{item.answer} .") for item in items for prefix in task.plain]
    return forms


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _unique_letter_items(task: Task, split: str, count: int, rng: random.Random) -> list[Item]:
    strings: dict[str, None] = {}
    while len(strings) < count:
        strings[_letters(rng, split)] = None
    return [_letter_item(task, letters) for letters in strings]


def sft_rows(split: str = "train", seed: int = 0) -> list[Row]:
    """Eight tasks in the chat frame with bare answers: ``prompt``, ``completion`` (messages) and ``kind`` (the task).

    500 rows a task for training, where the short lists (sums, opposites, categories) repeat; at most 44 for validation
    and test, where nothing repeats.
    """
    rng, rows, count = random.Random(f"sft/{split}/{seed}"), [], SFT_ROWS_PER_TASK[split]
    for name in SFT_TASKS:
        if name in LETTER_TASKS:
            asked = [(item, rng.choice(item.task.ask)) for item in _unique_letter_items(TASKS[name], split, count, rng)]
        else:
            pool = [(item, ask) for item in finite_items(name, (split,)) for ask in TASKS[name].ask]
            repeats = -(-count // len(pool)) if split == "train" else 1
            asked = [pair for _ in range(repeats) for pair in rng.sample(pool, len(pool))][:count]
        rows += [{"prompt": _message("user", item.fill(ask)), "completion": _message("assistant", item.answer),
                  "kind": name} for item, ask in asked]
    rng.shuffle(rows)
    return rows


def pref_rows(split: str = "train", seed: int = 0) -> list[Row]:
    """Questions of colour and place: ``prompt``, ``chosen``, ``rejected`` (messages) and ``kind`` (why rejected).

    chosen = polite opener, true fact, closer. rejected = ``rude`` with the true fact in as many words (40 %), the
    ``bare`` answer (30 %), or polite with a ``wrong`` fact (30 %).
    """
    rng, count = random.Random(f"pref/{split}/{seed}"), PREF_ROWS[split]
    pool = [(item, ask) for name in PREF_TASKS for item in finite_items(name, (split,)) for ask in TASKS[name].ask]
    asked = [pair for _ in range(-(-count // len(pool))) for pair in rng.sample(pool, len(pool))][:count]
    kinds = [kind for kind, share in REJECTED.items() for _ in range(round(share * count))]
    rng.shuffle(kinds)
    return [_pref_row(item, ask, kind, rng) for (item, ask), kind in zip(asked, kinds, strict=True)]


def _pref_row(item: Item, ask: str, kind: str, rng: random.Random) -> Row:
    opener, closer = rng.randrange(len(OPENERS)), rng.randrange(len(CLOSERS))
    values = COLOURS if item.task.name == "colour" else PLACES
    wrong = rng.choice([value for value in values if value != item.answer])
    style = "polite" if kind == "wrong" else kind
    rejected = answer_in_style(item, style, opener, closer, wrong if kind == "wrong" else None)
    return {"prompt": _message("user", item.fill(ask)),
            "chosen": _message("assistant", answer_in_style(item, "polite", opener, closer)),
            "rejected": _message("assistant", rejected), "kind": kind}


def words() -> list[str]:
    """Every word of the world, in a fixed order: the vocabulary of the tokenizer without its special tokens."""
    phrases = [text for task in TASKS.values() for text in (*task.plain, *task.ask, task.sentence)]
    phrases = [phrase.format(x="", z="", y="") for phrase in phrases]
    phrases += [*OPENERS, *CLOSERS, *RUDE_OPENERS, *RUDE_CLOSERS, "."]
    numbers = [str(number) for number in range(2 * LARGEST_ADDEND + 1)]
    listed = [*ascii_lowercase, *numbers, *NOUNS, *CATEGORIES, *COLOURS, *PLACES, *NAMES]
    listed += [word for pair in OPPOSITES for word in pair]
    listed += sorted({word for phrase in phrases for word in phrase.split()})
    return list(dict.fromkeys(listed))
