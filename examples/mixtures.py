"""Two heterogeneous training mixtures with exact answers, made by rule.

    python examples/mixtures.py desk --output data/desk
    python examples/mixtures.py words --output data/words

Each writes train.jsonl and held_out.jsonl in the alpaca form (with the task's name beside it). The same arguments
always give the same bytes. A question belongs to the held-out part when a hash of its text says so, so no
question of one part can be in the other, whatever the seed and the sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

HELD_OUT_SHARE = 5  # one question in five

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Karen", "Leo")
CITIES = ("Oslo", "Paris", "Rome", "Cairo", "Lima", "Tokyo", "Berlin", "Delhi", "Madrid", "Boston")
COLOURS = ("red", "blue", "green", "white", "black", "pink", "gold", "gray")
ADJECTIVES = {"small": "pim", "old": "dor", "happy": "lua", "quiet": "shen", "fast": "rik", "red": "vor"}
NOUNS = {"dog": "kano", "cat": "mifu", "house": "talo", "tree": "belu", "river": "sona", "king": "raso", "bird": "fipi"}
VERBS = {"sees": "oka", "finds": "ume", "loves": "ani", "follows": "ebo", "helps": "iza"}
ANIMALS = ("cat", "dog", "fox", "owl", "bear", "frog", "goat", "wolf", "duck", "crab")
GOOD = ("superb", "lovely", "great", "excellent", "charming", "perfect")
BAD = ("awful", "dull", "terrible", "rude", "dirty", "horrible")
THINGS = ("food", "room", "service", "music", "staff", "view", "soup", "price")
UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ROMAN = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"),
    (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip

# Draws a question and gives its only right answer.
Task = Callable[[random.Random], tuple[str, str]]


def dates(rng: random.Random) -> tuple[str, str]:
    """A written date -> ISO 8601."""
    month, day, year = rng.randrange(12), rng.randint(1, 28), rng.randint(1950, 2029)
    return f"{MONTHS[month]} {day}, {year}", f"{year}-{month + 1:02}-{day:02}"


def extract(rng: random.Random) -> tuple[str, str]:
    """A sentence about a person -> JSON."""
    name, age, city = rng.choice(NAMES), rng.randint(18, 90), rng.choice(CITIES)
    sentence = rng.choice(
        (f"{name} is {age} and lives in {city}.", f"{name} from {city} is {age}.", f"In {city} lives {name}, {age}.")
    )
    return sentence, json.dumps({"name": name, "age": age, "city": city})


def sort_letters(rng: random.Random) -> tuple[str, str]:
    """Four or five different letters -> in the order of the alphabet."""
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.choice((4, 5)))
    return " ".join(letters), " ".join(sorted(letters))


def lookup(rng: random.Random) -> tuple[str, str]:
    """A table of colours and numbers and one colour -> its number."""
    keys = rng.sample(COLOURS, 4)
    values = rng.sample(range(10, 100), 4)
    wanted = rng.randrange(4)
    table = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    return f"{table}. {keys[wanted]}?", str(values[wanted])


def translate(rng: random.Random) -> tuple[str, str]:
    """An English sentence -> an invented language: other words, the verb last."""
    adjective, subject = rng.choice(list(ADJECTIVES)), rng.choice(list(NOUNS))
    verb, thing = rng.choice(list(VERBS)), rng.choice(list(NOUNS))
    question = f"the {adjective} {subject} {verb} the {thing}"
    return question, f"{ADJECTIVES[adjective]} {NOUNS[subject]} {NOUNS[thing]} {VERBS[verb]}"


def sentiment(rng: random.Random) -> tuple[str, str]:
    """A review of two things -> positive, negative or mixed."""
    first, second = rng.sample(THINGS, 2)
    tones = rng.choice(((GOOD, GOOD), (BAD, BAD), (GOOD, BAD), (BAD, GOOD)))
    words = [rng.choice(tone) for tone in tones]
    label = "mixed" if tones[0] is not tones[1] else "positive" if tones[0] is GOOD else "negative"
    link = "but" if label == "mixed" else "and"
    return f"The {first} was {words[0]} {link} the {second} was {words[1]}.", label


def digits(rng: random.Random) -> tuple[str, str]:
    """A number in words -> in digits."""
    number = rng.randint(1, 9999)
    return number_words(number), str(number)


def number_words(number: int) -> str:
    """1 .. 9999 in English words."""
    parts = []
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            parts += [UNITS[number // size], name]
            number %= size
    if number >= 20:
        parts.append(TENS[number // 10] + (f"-{UNITS[number % 10]}" if number % 10 else ""))
    elif number:
        parts.append(UNITS[number])
    return " ".join(parts)


def reverse(rng: random.Random) -> tuple[str, str]:
    """Three to five words -> from back to front."""
    words = rng.sample(ANIMALS, rng.choice((3, 4, 5)))
    return " ".join(words), " ".join(reversed(words))


def clock(rng: random.Random) -> tuple[str, str]:
    """A time with am or pm -> on the 24-hour clock."""
    hour, minute = rng.randrange(24), rng.randrange(60)
    return f"{hour % 12 or 12}:{minute:02} {'am' if hour < 12 else 'pm'}", f"{hour:02}:{minute:02}"


def roman(rng: random.Random) -> tuple[str, str]:
    """A number up to 1999 -> Roman numerals."""
    number = rest = rng.randint(1, 1999)
    numeral = ""
    for value, sign in ROMAN:
        numeral += sign * (rest // value)
        rest %= value
    return str(number), numeral


# mixture -> task -> (instruction, how to make a question)
MIXTURES: dict[str, dict[str, tuple[str, Task]]] = {
    "desk": {
        "dates": ("Write the date in ISO format.", dates),
        "extract": ("Extract the person as JSON.", extract),
        "sort": ("Sort the letters.", sort_letters),
        "lookup": ("Look up the number.", lookup),
        "translate": ("Translate into Velan.", translate),
    },
    "words": {
        "sentiment": ("Label the review.", sentiment),
        "digits": ("Write the number in digits.", digits),
        "reverse": ("Reverse the words.", reverse),
        "clock": ("Use the 24-hour clock.", clock),
        "roman": ("Write as a Roman numeral.", roman),
    },
}


def is_held_out(task: str, question: str) -> bool:
    """Which part a question belongs to, forever."""
    return hashlib.sha256(f"{task}\n{question}".encode()).digest()[0] % HELD_OUT_SHARE == 0


def questions(task: str, make: Task, *, held_out: bool, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Up to `count` different questions of one part (fewer where the task has no more)."""
    rng = random.Random(f"{task} {held_out} {seed}")
    seen: set[str] = set()
    for _ in range(50 * count):
        if len(seen) == count:
            return
        question, answer = make(rng)
        if question not in seen and is_held_out(task, question) == held_out:
            seen.add(question)
            yield question, answer


def records(mixture: str, *, held_out: bool, per_task: int, seed: int) -> list[dict[str, str]]:
    """One part of a mixture, tasks shuffled together."""
    rows = [
        {"instruction": instruction, "input": question, "output": answer, "task": task}
        for task, (instruction, make) in MIXTURES[mixture].items()
        for question, answer in questions(task, make, held_out=held_out, count=per_task, seed=seed)
    ]
    random.Random(f"{mixture} {held_out} {seed}").shuffle(rows)
    return rows


def write(rows: list[dict[str, str]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", choices=MIXTURES)
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and held_out.jsonl")
    parser.add_argument("--train", type=int, default=1000, help="training questions for each task")
    parser.add_argument("--held-out", type=int, default=100, help="held-out questions for each task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, held_out, count in (("train", False, args.train), ("held_out", True, args.held_out)):
        rows = records(args.mixture, held_out=held_out, per_task=count, seed=args.seed)
        write(rows, args.output / f"{name}.jsonl")
        print(f"{args.output / name}.jsonl: {len(rows)} examples")


if __name__ == "__main__":
    main()
