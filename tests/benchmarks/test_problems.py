"""The word problems: arithmetic and wording against a parser of their text, and the scores of spoilt answers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.learning.problems import (
    ANSWER,
    COUNT,
    END_ID,
    HELD_OUT,
    ID,
    MASK_ID,
    PROMPT,
    WORDINGS,
    WORDS,
    Problems,
    Stream,
    answers,
    draw,
    prompts,
    save_tokenizer,
    score,
    text_of,
    wordings,
)
from training.data import TextEncoder

SIGNS = {"add": "+", "take": "-", "times": "*"}
NUMBERS = {"A": r"(?P<a>\d \d)", "N": r"(?P<n>\d)", "R": r"(?P<r>\d \d)"}
PATTERNS = {
    sign: [re.compile(" ".join(NUMBERS.get(word, re.escape(word)) for word in text.split())) for text in texts]
    for sign, texts in zip("+-*", WORDINGS)
}


def solved(prompt: str) -> list[tuple[int, str, int, int]]:
    """(before, sign, operand, after) of each operation of a prompt, by its text."""
    start = re.fullmatch(r"begin with (\d) (\d)((?: then \w+ \d)+) ;", prompt)
    assert start is not None, prompt
    value, found = int(start[1] + start[2]), []
    for word, digit in re.findall(r"then (\w+) (\d)", start[3]):
        after = {"+": value + int(digit), "-": value - int(digit), "*": value * int(digit)}[SIGNS[word]]
        found.append((value, SIGNS[word], int(digit), after))
        value = after
    return found


def is_right(prompt: str, answer: str) -> bool:
    """Whether a whole answer is right, by its text."""
    for before, sign, operand, after in solved(prompt):
        for pattern in PATTERNS[sign]:
            there = pattern.match(answer)
            if there and [int(there[key].replace(" ", "")) for key in "anr"] == [before, operand, after]:
                answer = answer[there.end() :].lstrip()
                break
        else:
            return False
    return answer == f"#### {after // 10} {after % 10}"


@pytest.fixture
def made() -> tuple[Problems, np.ndarray]:
    generator = np.random.default_rng(0)
    problems = draw(generator, 600, held_out=True)
    return problems, answers(problems, generator.integers(0, COUNT, (600, 4)))


def test_answers_are_right_and_fit(made: tuple[Problems, np.ndarray]) -> None:
    problems, ids = made
    asked = prompts(problems)
    assert ids.shape == (600, ANSWER)
    assert asked.shape == (600, PROMPT)
    for prompt, answer in zip(asked, ids):
        assert all(0 <= after <= 99 for *_, after in solved(text_of(prompt)))
        assert is_right(text_of(prompt), text_of(answer))
    assert (ids[:, -1] == END_ID).all()
    final, strict = score(problems, ids)
    assert final.all()
    assert strict.all()
    assert {2, 3, 4} == set(problems.steps.tolist())


def test_the_scores_of_spoilt_answers_are_the_parsers(made: tuple[Problems, np.ndarray]) -> None:
    """A token changed, left out or doubled somewhere; many of them lie behind the end, where nothing counts."""
    problems, ids = made
    generator = np.random.default_rng(1)
    spoilt = ids.copy()
    for row in spoilt:
        place = int(generator.integers(0, 50))
        kind = generator.integers(0, 3)
        if kind == 0:
            row[place] = generator.integers(0, MASK_ID)
        elif kind == 1:
            row[place:-1] = row[place + 1 :].copy()
        else:
            row[place + 1 :] = row[place:-1].copy()
    final, strict = score(problems, spoilt)
    for number, prompt in enumerate(prompts(problems)):
        row = spoilt[number].tolist()
        answer = " ".join(WORDS[i] for i in row[: row.index(END_ID)])
        assert strict[number] == is_right(text_of(prompt), answer), answer
        value = solved(text_of(prompt))[-1][3]
        assert final[number] == (answer.partition("#### ")[2] == f"{value // 10} {value % 10}"), answer
    assert 0.1 < strict.mean() < 0.9
    assert (strict <= final).all()


def test_numbers_that_are_consistent_and_wrong_do_not_pass() -> None:
    """All of the answer to another problem is well worded."""
    problems = draw(np.random.default_rng(2), 400)
    others = draw(np.random.default_rng(3), 400)
    final, strict = score(problems, answers(others, np.zeros((400, 4), dtype=np.int64)))
    assert not strict.any()
    assert final.mean() < 0.05


def test_an_answer_without_result_or_end_is_wrong(made: tuple[Problems, np.ndarray]) -> None:
    problems, ids = made
    assert not score(problems, np.full_like(ids, ID["."]))[0].any()
    assert not score(problems, np.full_like(ids, END_ID))[0].any()
    first = np.full_like(ids, END_ID)
    first[:, 1:] = ids[:, :-1]  # all of it after the end of text
    assert not score(problems, first)[0].any()


def test_what_is_kept_for_testing_is_never_trained_on() -> None:
    seen = {text_of(row[:PROMPT]) for step in range(4) for row in Stream(512, seed=0)(step).ids}
    kept = draw(np.random.default_rng(5), 2000, held_out=True)
    assert not seen & {text_of(row) for row in prompts(kept)}
    share = draw(np.random.default_rng(6), 20_000).held_out
    assert not share.any()
    assert kept.held_out.all()
    assert len({text_of(row) for row in prompts(kept)}) > 1800
    assert 8 < HELD_OUT < 32


def test_the_wordings_of_an_answer_are_found() -> None:
    generator = np.random.default_rng(7)
    problems, used = draw(generator, 300), generator.integers(0, COUNT, (300, 4))
    there = np.arange(4) < problems.steps[:, None]
    ids = answers(problems, used)
    assert (wordings(problems, ids) == np.where(there, used, -1)).all()
    ids[:, 3] = ID["begin"]  # in the first sentence, however it is worded
    assert (wordings(problems, ids) == -1).all()


def test_wordings_are_drawn_evenly_and_differ_in_length() -> None:
    pairs = Stream(3000, seed=1)(0)
    first = [text_of(row[PROMPT:]).split(" . ")[0] for row in pairs.ids]
    counts = [
        sum(any(patterns[choice].fullmatch(f"{text} .") for patterns in PATTERNS.values()) for text in first)
        for choice in range(COUNT)
    ]
    assert sum(counts) == 3000
    assert all(abs(count - 500) < 5 * 20.4 for count in counts)
    assert len({len(text.split()) for texts in WORDINGS for text in texts}) > 3


def test_the_tokenizer_gives_the_words_their_ids(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    encoder = TextEncoder.load(tmp_path)
    assert (encoder.vocab_size, encoder.eos_id, encoder.mask_id) == (len(WORDS), END_ID, MASK_ID)
    row = Stream(1, seed=0)(0).ids[0]
    ids = encoder.encode([" ".join(WORDS[i] for i in row if i != END_ID)])
    assert ids == [i for i in row.tolist() if i != END_ID]
