"""The decoders' benchmark runs at a size for a CPU, and its plain loops follow the same rules as ours."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mdkern
from benchmarks import bench_decoders, decoder_tables, plain_decoders
from benchmarks.bench_decoders import measure
from benchmarks.decoder_cases import Case, Gauge
from benchmarks.decoder_setting import PARTS, Bench, Shape, Size, run_plain
from benchmarks.plain_decoders import make_cases
from benchmarks.plain_loop import Plain, Step, decode, even_quotas
from mdkern import decoders
from mdkern.decoders import Stepwise
from mdkern.profiling.profile import Unpadded
from tests.conftest import random_dit
from tests.references.slow_sampler import PairModel

LENGTH, VOCAB, STEPS, PROMPT = 12, 9, 4, 4
MODEL = PairModel(LENGTH, VOCAB)
PAPER = Shape(2, 32, 2, vocab_size=64, mask_id=63, length=20, prompt=4, steps=8, block_length=4)
TINY = Size(
    paper=PAPER,
    batch=2,
    llada=replace(PAPER, vocab_size=72, mask_id=66),
    llada_batches=(1, 2),
    pair_length=8,
    pair_steps=4,
    pair_block=4,
    pair_samples=2,
    judged=4,
    runs=1,
    timed_steps=2,
)
CASES = {case.name: case for case in make_cases(Gauge(0.4, 2.5, 2.0), 0.0, LENGTH, VOCAB + 1, 4, torch.device("cpu"))}
DRAWN = decoders.ReMDM | decoders.Edit  # the first draws what it masks again; edits are compared below
SAME = [name for name, case in CASES.items() if isinstance(case.ours, Stepwise) and not isinstance(case.ours, DRAWN)]
pytestmark = pytest.mark.filterwarnings("ignore:.*runs by its logits")


def starts(count: int) -> Tensor:
    ids = torch.randint(VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(3))
    ids[:, PROMPT:] = MODEL.mask_id
    return ids


@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("name", SAME)
def test_plain_loops_reveal_what_ours_reveal(name: str, block_length: int | None) -> None:
    check_same_text(CASES[name], block_length)


def check_same_text(case: Case, block_length: int | None) -> None:
    """One sequence at a time, greedily: the same positions in every pass, and the same text."""
    ours, plain = case.ours, case.plain
    several = 0
    for row in starts(6).split(1):
        seen: list[Tensor] = []
        settings = {"steps": STEPS, "block_length": block_length}
        text = decode(
            MODEL.logits, row, plain, mask_id=MODEL.mask_id, watch=lambda ids, seen=seen: seen.append(ids), **settings
        )
        output = mdkern.sample(
            MODEL.denoiser(), input_ids=row, decoder=ours, temperature=0.0, return_history=True, **settings
        )
        assert torch.equal(output.sequences, text)
        assert int(output.nfe["H"]) == len(seen)
        if not ours.adaptive:
            step = output.history.step
            for number, ids in enumerate(seen):
                assert torch.equal(ids != MODEL.mask_id, step < number)
        revealed = [int((a != b).sum()) for a, b in zip(seen, [*seen[1:], text])]
        several += sum(count > 1 for count in revealed)
    assert several, "no pass revealed more than one position: the rule was not put to the test"


def test_plain_edits_are_ours() -> None:
    ours = decoders.Edit(0.5, 0.3, 3)
    rule = partial(plain_decoders.edit, mask_threshold=0.5, edit_threshold=0.3)
    for row in starts(6).split(1):
        text = decode(
            MODEL.logits, row, Plain(rule, adaptive=True, closing_steps=3), steps=STEPS, mask_id=MODEL.mask_id
        )
        output = mdkern.sample(MODEL.denoiser(), input_ids=row, decoder=ours, temperature=0.0, steps=STEPS)
        assert torch.equal(output.sequences, text)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_plain_loop_fills_in_all_masks_and_keeps_the_prompt(temperature: float) -> None:
    model = random_dit(vocab_size=16, mask_id=15)
    ids = torch.full((3, 16), 15)
    ids[:, :4] = torch.arange(4)
    for case in make_cases(Gauge(), temperature, 16, 16, 4, torch.device("cpu")):
        text = run_plain(Unpadded(model), case, ids, 12)
        assert torch.equal(text[:, :4], ids[:, :4]), case.name
        assert not bool((text == 15).any()), case.name


def test_a_run_may_be_cut_short() -> None:
    seen: list[Tensor] = []
    decode(
        MODEL.logits, starts(2), Plain(plain_decoders.top_probability), steps=8, mask_id=MODEL.mask_id,
        block_length=4, most_steps=5, watch=seen.append,
    )  # fmt: skip
    assert len(seen) == 5


def test_quotas_share_out_all_masks() -> None:
    masked = torch.arange(11) < torch.tensor([[11], [4], [0]])
    assert even_quotas(masked, 4).tolist() == [[3, 3, 3, 2], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).expand(1, 20_000, 4)
    masked = torch.ones(1, 20_000, dtype=torch.bool)
    step = Step(
        logits, torch.full((1, 20_000), 9), masked, masked, 0, 1, 20_000, even_quotas(masked, 1), 9, 0.5,
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    expected = (logits[0, 0] / 0.5).softmax(-1)
    drawn = plain_decoders.draw(logits, step)
    assert torch.allclose(torch.bincount(drawn[0], minlength=4) / 20_000, expected, atol=0.015)
    one_step = plain_decoders.remdm_cap(step)  # the last step: every mask becomes a token of the plain distribution
    share = torch.bincount(one_step[0], minlength=4) / 20_000
    assert torch.allclose(share, logits[0, 0].softmax(-1), atol=0.015)


def test_nucleus_keeps_the_fewest_that_reach_top_p() -> None:
    kept = plain_decoders.nucleus(torch.tensor([[0.5, 0.1, 0.3, 0.1]]), 0.75)
    assert torch.allclose(kept, torch.tensor([[0.625, 0.0, 0.375, 0.0]]))


def test_bounds_are_set_to_what_a_model_gives() -> None:
    """The threshold lets half of the block pass, the factor a quarter, the entropy bound eight."""
    probability = torch.rand(1, 32, generator=torch.Generator().manual_seed(0))
    entropy = torch.rand(1, 60, generator=torch.Generator().manual_seed(1))
    gauge = Gauge.of(probability, entropy)
    assert int((probability >= gauge.threshold).sum()) in (16, 17)
    best, place = probability[0].sort(descending=True).values, torch.arange(1, 33)
    passes = ((place + 1) * (1 - best) < gauge.factor + 1e-6).int().cumprod(0)
    assert int(passes.sum()) == 8
    ascending = entropy[0].sort().values
    assert int((ascending.cumsum(0) - ascending <= gauge.gamma + 1e-6).sum()) == 8


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts, measured of tiny models."""
    path = tmp_path_factory.mktemp("results") / "decoders.json"
    assert measure(tiny_bench(), list(PARTS), path) == {}
    return path


def tiny_bench() -> Bench:
    shape = {"vocab_size": 4096, "mask_id": 4095, "max_length": 8, "num_blocks": 1}
    return Bench(TINY, torch.device("cpu"), lambda device: (random_dit(**shape),))


@pytest.mark.slow
def test_every_decoder_is_measured(results: Path) -> None:
    parts = json.loads(results.read_text())["parts"]
    kinds = {type(case.ours) for case in make_cases(Gauge(), 0.0, 8, 16, 4, torch.device("cpu"))}
    assert kinds == set(decoders.DECODERS.values())
    for part in ("size", "pair"):
        assert len(parts[part]) == len(kinds)
        for row in parts[part].values():
            assert row["ratio"] == pytest.approx(row["plain"]["run"] / row["ours"]["median"])
    row = parts["size"]["top probability"]
    assert row["plain"]["run"] == pytest.approx(TINY.paper.steps * row["plain"]["step"]["median"])
    assert row["ours"]["passes"] == TINY.paper.steps
    assert parts["size"]["first hitting"]["plain"]["steps"] == 16
    assert {row["batch"] for row in parts["llada"].values()} == {1, 2}


@pytest.mark.slow
def test_caches_are_compared_with_doing_without(results: Path) -> None:
    rows = json.loads(results.read_text())["parts"]["caches"]
    assert len(rows) == 9
    for name, row in rows.items():
        assert name.endswith(row["cache"])
        assert 0.0 <= row["differ"] <= 1.0
        if row["cache"] == "none":
            assert row["differ"] == row["differ_in_first_block"] == 0.0


@pytest.mark.slow
def test_what_is_measured_is_not_measured_again(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads(results.read_text())
    del before["parts"]["size"]["margin"]
    results.write_text(json.dumps(before))
    measure(tiny_bench(), ["size"], results)
    after = json.loads(results.read_text())
    assert "margin" in after["parts"]["size"]
    del after["parts"]["size"]["margin"]
    assert after == before
    monkeypatch.setattr(bench_decoders, "environment", lambda: {"device": "another"})
    measure(tiny_bench(), ["size"], results, limit=-1.0)
    assert bench_decoders.read(results)["parts"] == {}


def test_failures_and_a_lack_of_time_leave_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "decoders.json"

    def rows(bench: Bench) -> Any:
        def failing() -> Any:
            raise RuntimeError("no such kernel\nmore")

        yield "first", failing
        yield "second", lambda: {"way": "w", "tokens_per_second": 1.0}

    monkeypatch.setitem(PARTS, "size", rows)
    assert measure(tiny_bench(), ["size"], path) == {"size, first": "RuntimeError: no such kernel"}
    assert list(json.loads(path.read_text())["parts"]["size"]) == ["second"]
    assert set(measure(tiny_bench(), ["size"], path, limit=-1.0, anew=True).values()) == {"no time left"}


@pytest.mark.slow
def test_tables(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads(results.read_text())
    content["environment"] = {"device": "a card", "torch": "2", "triton": "3"}
    for row in content["parts"]["llada"].values():
        row["peak_gib"] = 1.0
    monkeypatch.setattr(decoder_tables, "load", lambda _: content)
    for table in decoder_tables.TABLES.values():
        lines = [line for line in table().splitlines() if line.startswith("|")]
        assert len(lines) > 2
        assert len({line.count("|") for line in lines}) == 1
