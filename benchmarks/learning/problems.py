"""Word problems whose answers can be checked and can be worded in many ways, for experiments on parallel decoding.

A problem is a number and two to four operations on it; all values have two digits. Its answer has one sentence for each
operation, in one of six wordings, drawn independently, and the last value after ``####``. A number is two tokens and a
sentence many, so that tokens which are written in parallel can contradict each other, in numbers and in wording.

    prompt    _ _ … begin with 1 2 then add 7 then take 4 ;
    answer    add 7 to 1 2 to get 1 9 . 1 5 is 1 9 minus 4 . #### 1 5

Everything is a NumPy array over problems; ids are those of `WORDS`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mdkern.files import write_whole
from training.batches import Array, step_generator
from training.pairs import PaddedPairs

WORDINGS: tuple[tuple[str, ...], ...] = (
    (
        "A + N = R .",
        "add N to A to get R .",
        "R is A plus N .",
        "so now we have R since A + N is that .",
        "A plus N makes R .",
        "with N more on top A becomes R .",
    ),
    (
        "A - N = R .",
        "take N from A to get R .",
        "R is A minus N .",
        "so now we have R since A - N is that .",
        "A less N leaves R .",
        "with N removed A goes down to R .",
    ),
    (
        "A * N = R .",
        "multiply A by N to get R .",
        "R is A times N .",
        "so now we have R since A * N is that .",
        "A times N makes R .",
        "with N times as much A grows to R .",
    ),
)
ASKED = "add", "take", "times"  # the operations in a prompt
END, MASK, PAD, RESULT = "<|endoftext|>", "<|mask|>", "_", "####"
MOST_STEPS, MOST_VALUE = 4, 99
PROMPT, ANSWER = 32, 64  # columns
PLACEHOLDERS = {"A": (-1, -2), "N": (-3,), "R": (-4, -5)}  # tens, ones
NONE = -9  # no token
HELD_OUT = 16  # one problem of so many is kept for testing


def vocabulary() -> list[str]:
    words = [str(digit) for digit in range(10)]
    texts = [*(text for texts in WORDINGS for text in texts), "begin with then ;", *ASKED]
    words += [word for text in texts for word in text.split() if word not in PLACEHOLDERS]
    return [END, *dict.fromkeys(words), RESULT, PAD, MASK]


WORDS = vocabulary()
ID = {word: number for number, word in enumerate(WORDS)}
END_ID, MASK_ID = ID[END], ID[MASK]


def codes(text: str) -> list[int]:
    """A wording's ids, and what stands for numbers."""
    return [code for word in text.split() for code in PLACEHOLDERS.get(word, (ID.get(word, NONE),))]


def table() -> Array:
    """Codes of all wordings, int64 ``[3, 6, W]``, filled up with `NONE`."""
    rows = [[codes(text) for text in texts] for texts in WORDINGS]
    width = max(len(row) for texts in rows for row in texts)
    return np.array([[row + [NONE] * (width - len(row)) for row in texts] for texts in rows])


TABLE = table()
COUNT = TABLE.shape[1]  # wordings of an operation


@dataclass(frozen=True)
class Problems:
    """N problems.

    Attributes:
        start: int64 ``[N]``.
        steps: int64 ``[N]``, how many operations.
        operation, operand, value: int64 ``[N, 4]``: 0 to 2 for +, -, *; 1 to 9; and the value after each operation.
            Beyond a problem's steps they go on and are not part of it.
    """

    start: Array
    steps: Array
    operation: Array
    operand: Array
    value: Array

    def __len__(self) -> int:
        return len(self.start)

    def take(self, index: Array) -> Problems:
        return Problems(*(x[index] for x in (self.start, self.steps, self.operation, self.operand, self.value)))

    @property
    def result(self) -> Array:
        found: Array = np.take_along_axis(self.value, self.steps[:, None] - 1, 1)[:, 0]
        return found

    @property
    def held_out(self) -> Array:
        """Whether each belongs to the problems that are kept for testing, bool ``[N]``; equal ones always agree."""
        number = self.start.astype(np.uint64)
        for step in range(MOST_STEPS):
            there = self.steps > step
            code = np.where(there, 1 + 10 * self.operation[:, step] + self.operand[:, step], 0).astype(np.uint64)
            number = (number * np.uint64(31) + code) * np.uint64(0x9E3779B97F4A7C15)
            number ^= number >> np.uint64(29)
        found: Array = number % np.uint64(HELD_OUT) == 0
        return found


def draw_any(generator: np.random.Generator, count: int) -> Problems:
    """Problems of any kind. An operation that would leave 0..99 is replaced by a subtraction or addition that fits."""
    start = generator.integers(0, 51, count)
    steps = generator.integers(2, MOST_STEPS + 1, count)
    operation = generator.integers(0, 3, (count, MOST_STEPS))
    operand = generator.integers(1, 10, (count, MOST_STEPS))
    values, value = [], start
    for step in range(MOST_STEPS):
        kind, number = operation[:, step], operand[:, step]
        number = np.where((kind == 2) & (number == 1), 2, number)
        kind = np.where((kind == 2) & (value * number > MOST_VALUE), 1, kind)
        kind = np.where((kind == 0) & (value + number > MOST_VALUE), 1, kind)
        kind = np.where((kind == 1) & (value < number), 0, kind)
        value = np.choose(kind, (value + number, value - number, value * number))
        operation[:, step], operand[:, step] = kind, number
        values.append(value)
    return Problems(start, steps, operation, operand, np.stack(values, 1))


def draw(generator: np.random.Generator, count: int, held_out: bool = False) -> Problems:
    """Problems to train on, or of those that are kept for testing, which are never among the former."""
    found: list[Problems] = []
    while sum(map(len, found)) < count:
        problems = draw_any(generator, 2 * count * (HELD_OUT if held_out else 1))
        found.append(problems.take(np.flatnonzero(problems.held_out == held_out)))
    names = ("start", "steps", "operation", "operand", "value")
    return Problems(*(np.concatenate([getattr(part, name) for part in found])[:count] for name in names))


def digits(value: Array) -> tuple[Array, Array]:
    """The ids of a value's tens and ones."""
    return ID["0"] + value // 10, ID["0"] + value % 10


def sentences(problems: Problems, step: int, wording: Array) -> Array:
    """The sentences of one operation in given wordings ``[N, ...]``: int64 ``[N, ..., W]``, `NONE` after their end."""
    shape = (-1,) + (1,) * (wording.ndim - 1)
    rows = TABLE[problems.operation[:, step].reshape(shape), wording]
    before = problems.start if step == 0 else problems.value[:, step - 1]
    numbers = [*digits(before), ID["0"] + problems.operand[:, step], *digits(problems.value[:, step])]
    for place, number in enumerate(numbers, start=1):
        rows = np.where(rows == -place, number.reshape(*shape, 1), rows)
    return rows


def prompts(problems: Problems) -> Array:
    """int64 ``[N, 32]``, filled up on the left."""
    ids = np.full((len(problems), PROMPT), ID[PAD])
    texts = [np.full(len(problems), ID[word]) for word in ("begin", "with")] + list(digits(problems.start))
    rows = np.stack(texts, 1)
    asked = np.array([ID[word] for word in ASKED])
    for step in range(MOST_STEPS):
        there = (problems.steps > step)[:, None]
        operation = np.stack(
            (
                np.full(len(problems), ID["then"]),
                asked[problems.operation[:, step]],
                ID["0"] + problems.operand[:, step],
            ),
            1,
        )
        rows = np.concatenate((rows, np.where(there, operation, NONE)), 1)
    rows = np.concatenate((rows, np.full((len(problems), 1), ID[";"])), 1)
    real = rows != NONE
    column = PROMPT - real.sum(1, keepdims=True) + real.cumsum(1) - 1
    row = np.broadcast_to(np.arange(len(problems))[:, None], rows.shape)
    ids[row[real], column[real]] = rows[real]
    return ids


def answers(problems: Problems, wording: Array) -> Array:
    """Answers in the given ``wording [N, 4]``, int64 ``[N, 64]``, filled up with end of text."""
    ids = np.full((len(problems), ANSWER), END_ID)
    at = np.zeros(len(problems), dtype=np.int64)
    for step in range(MOST_STEPS):
        rows = np.where((problems.steps > step)[:, None], sentences(problems, step, wording[:, step]), NONE)
        at = write(ids, at, rows)
    write(ids, at, closing(problems)[:, :3])
    return ids


def closing(problems: Problems) -> Array:
    """What an answer ends with, int64 ``[N, 4]``: the mark of the result, its digits, and the end of text."""
    count = len(problems)
    return np.stack((np.full(count, ID[RESULT]), *digits(problems.result), np.full(count, END_ID)), 1)


def write(ids: Array, at: Array, rows: Array) -> Array:
    """Write the tokens of ``rows [N, W]`` into ``ids [N, L]`` from columns ``at [N]`` on; returns where they end."""
    real = rows != NONE
    row, column = np.nonzero(real)
    ids[row, at[row] + column] = rows[real]
    ends: Array = at + real.sum(1)
    return ends


def score(problems: Problems, found: Array) -> tuple[Array, Array]:
    """Of answers ``found [N, 64]``: whether the result is right, and whether the whole answer is, bool ``[N]`` each.

    The result is what stands between the first ``####`` and the first end of text. A whole answer has a sentence for
    each operation in its order, each one of the wordings with the right numbers; then the result, then the end.
    """
    wide = np.concatenate((found, np.full((len(found), TABLE.shape[2] + 4), END_ID)), 1)
    end = closing(problems)
    mark = np.where((wide == ID[RESULT]).any(1), (wide == ID[RESULT]).argmax(1), wide.shape[1] - 4)
    final = matches(wide, mark, end[:, None])[:, 0] & (mark < (wide == END_ID).argmax(1))
    used, at = parsed(problems, wide)
    strict = (used >= 0).sum(1) == problems.steps
    strict &= matches(wide, at, end[:, None])[:, 0]
    return final, strict


def wordings(problems: Problems, found: Array) -> Array:
    """The wording of each sentence of answers ``found [N, 64]``, int64 ``[N, 4]``.

    It is -1 from the first sentence on that is none of the wordings with the right numbers, and where there is none.
    """
    return parsed(problems, np.concatenate((found, np.full((len(found), TABLE.shape[2]), END_ID)), 1))[0]


def parsed(problems: Problems, wide: Array) -> tuple[Array, Array]:
    """`wordings`, and the column behind the last right sentence, int64 ``[N]``."""
    at, right = np.zeros(len(wide), dtype=np.int64), np.ones(len(wide), dtype=bool)
    every = np.broadcast_to(np.arange(COUNT), (len(wide), COUNT))
    used = np.full((len(wide), MOST_STEPS), -1)
    for step in range(MOST_STEPS):
        rows = sentences(problems, step, every)
        same = matches(wide, at, rows)
        right = right & same.any(1) & (problems.steps > step)
        length = (rows != NONE).sum(2)[np.arange(len(wide)), same.argmax(1)]
        used[:, step] = np.where(right, same.argmax(1), -1)
        at = at + np.where(right, length, 0)
    return used, at


def matches(ids: Array, at: Array, rows: Array) -> Array:
    """Whether the tokens of ``rows [N, C, W]`` stand in ``ids [N, L]`` from columns ``at [N]`` on, bool ``[N, C]``."""
    columns = np.minimum(at[:, None] + np.arange(rows.shape[2]), ids.shape[1] - 1)
    there = np.take_along_axis(ids, columns, 1)[:, None]
    found: Array = ((rows == NONE) | (rows == there)).all(2)
    return found


@dataclass(frozen=True)
class Stream:
    """Fresh problems with answers in wordings drawn uniformly: those of a step, a pure function of (seed, step)."""

    batch_size: int
    seed: int

    def __call__(self, step: int) -> PaddedPairs:
        generator = step_generator(self.seed, step, stream=3)
        problems = draw(generator, self.batch_size)
        ids = answers(problems, generator.integers(0, COUNT, (self.batch_size, MOST_STEPS)))
        whole = np.concatenate((prompts(problems), ids), 1)
        return PaddedPairs(whole, np.full(self.batch_size, PROMPT))


def text_of(ids: Array) -> str:
    """The words of ids, without what fills up."""
    return " ".join(WORDS[number] for number in ids.tolist() if number not in (END_ID, ID[PAD]))


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of these words, one a token, for `mdkern sample` and `training.finetune`."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(ID, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken(MASK, special=True)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "mask_token": MASK,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2))
    write_whole(folder / "tokenizer.json", tokenizer.to_str())
