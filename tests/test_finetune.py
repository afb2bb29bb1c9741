"""Fine-tuning: worked examples, objectives against plain restatements, exact resumption, refused arguments."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdkern.models import DiT, DiTConfig, load_dit, save_dit
from tests.test_training import losses, one_thread, two_processes
from training import finetune
from training.loop import Objective, World
from training.objectives import response_losses, rolled_out
from training.pairs import (
    Epochs,
    Noise,
    PaddedPairs,
    ResponseBatches,
    chosen_rows,
    read_pairs,
    response_batches,
)

__all__ = ["one_thread"]  # the fixture applies here, too

CPU = World(0, 1, torch.device("cpu"))
VOCAB, MASK, EOS = 16, 15, 0


def toy(block_causal: int | None = None, seed: int = 0) -> DiT:
    """With weights so large that its predictions differ everywhere."""
    torch.manual_seed(seed)
    config = DiTConfig(VOCAB, MASK, EOS, max_length=32, num_blocks=2, width=16, num_heads=2, block_causal=block_causal)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def array(values: list[list[float]] | list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


class Table(torch.nn.Module):
    """Stands in for a DiT whose hidden states are its logits, one table for each pass, the last one for those after."""

    def __init__(self, *logits: torch.Tensor) -> None:
        super().__init__()
        self.config = DiTConfig(10, 9, 0, width=4, num_heads=1)
        self.passes = list(logits)
        self.seen: list[torch.Tensor] = []

    def hidden(self, input_ids: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        self.seen.append(input_ids)
        return self.passes[min(len(self.seen), len(self.passes)) - 1]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def logits_for(ids: torch.Tensor, cross_entropy: torch.Tensor, vocab: int = 10) -> torch.Tensor:
    """Logits whose cross-entropies at these ids are the given ones."""
    p = torch.exp(-cross_entropy.double())
    rest = ((1 - p) / (vocab - 1)).clamp(min=1e-300)
    logits = rest.log()[..., None].expand(*ids.shape, vocab).clone()
    return logits.scatter(-1, ids[..., None], p.log()[..., None])


class TestWorkedExamples:
    """Numbers worked out by hand."""

    def test_on_policy_uniform_training(self) -> None:
        ids = np.array([[7, 5, 6, 1, 2, 3, 4, 0, 0, 0, 0, 0]])
        uniforms = array([[0.1, 0.1, 0.1, 0.2, 0.9, 0.5, 0.74, 0.76, 0.3, 0.8, 0.1, 0.2]])
        noisy = [7, 5, 6, 9, 2, 9, 9, 0, 9, 0, 9, 9]
        argmax = torch.tensor([[7, 5, 6, 1, 8, 8, 4, 0, 0, 3, 0, 5]])
        rolled = [7, 5, 6, 1, 2, 8, 4, 0, 0, 0, 0, 5]
        found = torch.tensor([[1.0, 1, 1, 0.2, 0.1, 1.5, 0.4, 0.05, 0.3, 1, 1, 1]])
        for masked_labels, loss in ((False, 0.425), (True, 0.6)):
            noise = Noise("oput", 9, 0, 10, tail=2, masked_labels=masked_labels)
            pairs, t = PaddedPairs(ids, np.array([3])), array([0.75])
            for on_policy, seen in ((True, rolled), (False, noisy)):
                model = Table(torch.nn.functional.one_hot(argmax, 10).double(), logits_for(torch.tensor(ids), found))
                [batch] = response_batches(noise, pairs, t, uniforms, uniforms, np.array([on_policy]))
                assert batch.noisy_ids.tolist() == [noisy]
                value = Objective(model, response_losses, 1.0)(*batch)
                assert float(value) == pytest.approx(loss, abs=1e-6)
                assert model.seen[0].tolist() == [noisy]
                assert model.seen[1].tolist() == [seen]
                labels = sorted(batch.row_index[batch.weights > 0].tolist())
                assert labels == ([3, 5, 6, 8] if masked_labels else [3, 4, 5, 6, 7, 8])

    @pytest.mark.parametrize(("normalise", "loss"), [("sequence", 1.717346), ("token", 1.664950)])
    def test_supervised_fine_tuning(self, normalise: str, loss: float) -> None:
        ids = np.array([[1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7]])
        t = array([1e-3 + (1 - 1e-3) * 0.4, 1e-3 + (1 - 1e-3) * 0.8])
        uniforms = array([[0, 0, 0.39, 0.5, 0.3, 0.9], [0, 0, 0, 0, 0.7, 0.85]])
        found = torch.tensor([[1.0, 1, 2, 1, 0.5, 1], [1, 1, 1, 1, 3, 2]])
        noise = Noise("sft", 9, 0, 10, normalise=normalise)
        pairs = PaddedPairs(ids, np.array([2, 4]))
        [batch] = response_batches(noise, pairs, t, uniforms, uniforms, np.zeros(2, dtype=bool))
        assert (batch.noisy_ids == 9).nonzero().tolist() == [[0, 2], [0, 4], [1, 4]]
        model = Table(logits_for(torch.tensor(ids), found))
        assert float(Objective(model, response_losses, 1.0)(*batch)) == pytest.approx(loss, abs=6e-7)

    def test_pre_training_is_the_same_without_prompts(self) -> None:
        ids = np.array([[1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7]])
        uniforms = array([[0, 0, 0.39, 0.5, 0.3, 0.9], [0, 0, 0, 0, 0.7, 0.85]])
        found = torch.tensor([[1.0, 1, 2, 1, 0.5, 1], [1, 1, 1, 1, 3, 2]])
        noise = Noise("sft", 9, 0, 10, normalise="token")
        [batch] = response_batches(
            noise,
            PaddedPairs(ids, np.zeros(2, np.int64)),
            array([0.4006, 0.8002]),
            uniforms,
            uniforms,
            np.zeros(2, bool),
        )
        model = Table(logits_for(torch.tensor(ids), found))
        assert float(Objective(model, response_losses, 1.0)(*batch)) == pytest.approx(1.665080, abs=6e-7)


# ------------------------------------------------------------------------------------------------- plain restatements


def plain_row(model: DiT, noisy: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """log p ``[L, V]`` of one sequence, by a pass of its own for each block that the model sees by itself."""
    block = model.config.block_causal
    if block is None:
        return model(noisy[None])[0].log_softmax(-1)
    rows = []
    for start in range(0, len(noisy), block):
        text = torch.cat((clean[:start], noisy[start : start + block]))
        rows.append(model(text[None])[0, start:].log_softmax(-1))
    return torch.cat(rows)


def plain_loss(
    model: DiT,
    noise: Noise,
    pairs: PaddedPairs,
    t: np.ndarray,
    uniforms: np.ndarray,
    draws: np.ndarray,
    on_policy: np.ndarray,
) -> torch.Tensor:
    """The objective, sequence by sequence and token by token."""
    sums, own, labelled = [], [], []
    for n, (ids, prompt) in enumerate(zip(pairs.ids.tolist(), pairs.prompt_lengths.tolist())):
        clean, noisy = torch.tensor(ids), torch.tensor(ids)
        masked = [i for i in range(prompt, len(ids)) if uniforms[n, i] < t[n]]
        noisy[masked] = noise.mask_id
        if noise.objective == "uniform":  # one of the other ids, by its place among them
            others = [token for token in range(noise.vocab_size) if token != noise.mask_id]
            for i in masked:
                noisy[i] = others[int(float(draws[n, i]) * len(others))]
        end = len(ids)
        while end > prompt and ids[end - 1] == noise.eos_id:
            end -= 1
        labels = masked if noise.objective == "sft" else list(range(prompt, min(len(ids), end + noise.tail)))
        if noise.masked_labels:
            labels = [i for i in labels if i in masked]
        if on_policy[n]:
            with torch.no_grad():
                noisy[masked] = plain_row(model, noisy, clean).argmax(-1)[masked]
        log_p = plain_row(model, noisy, clean)
        weight = 1 / float(t[n]) if noise.objective == "sft" else 1.0
        sums.append(sum((-weight * log_p[i, clean[i]] for i in labels), torch.zeros(())))
        own.append(len(ids) - prompt if noise.objective == "sft" else len(labels))
        labelled.append(len(labels))
    if noise.normalise == "sequence":
        return sum((s / max(1, n) for s, n in zip(sums, own)), torch.zeros(())) / len(sums)
    return sum(sums, torch.zeros(())) / (sum(own) if noise.normalise == "token" else len(sums))


def some_pairs(count: int = 6, length: int = 12, seed: int = 0) -> PaddedPairs:
    generator = np.random.default_rng(seed)
    ids = generator.integers(1, MASK, (count, length))
    prompts = generator.integers(0, 5, count)
    for row, prompt in enumerate(prompts):
        ids[row, generator.integers(prompt + 1, length + 1) :] = EOS
    return PaddedPairs(ids, prompts)


@pytest.mark.parametrize("block_causal", [None, 4])
@pytest.mark.parametrize("normalise", ["sequence", "token", "batch"])
@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("sft", {}),
        ("oput", {"tail": 2}),
        ("oput", {"tail": 2, "masked_labels": True}),
        ("masked", {"tail": 3, "ratio": (0.3, 0.8)}),
        ("uniform", {"tail": 2}),
    ],
)
def test_objectives_are_their_plain_restatements(
    block_causal: int | None, normalise: str, objective: str, changes: dict[str, Any]
) -> None:
    """In float64, with the gradient, in one piece and in micro-batches."""
    model = toy(block_causal).double()
    noise = Noise(objective, MASK, EOS, VOCAB, normalise=normalise, **changes)
    pairs = some_pairs()
    generator = np.random.default_rng(1)
    t = noise.times(6, generator)
    uniforms, draws = (generator.random(pairs.ids.shape, dtype=np.float32) for _ in range(2))
    on_policy = np.array([objective == "oput"] * 3 + [False] * 3)
    expected = plain_loss(model, noise, pairs, t, uniforms, draws, on_policy)
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for shards in ([slice(None)], [slice(k, None, 3) for k in range(3)]):
        model.zero_grad()
        batches = response_batches(noise, pairs, t, uniforms, draws, on_policy, shards)
        total = sum(Objective(model, response_losses, 1.0)(*batch) for batch in batches)
        assert isinstance(total, torch.Tensor)
        total.backward()
        ours = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=2e-6)  # weights are float32
        assert torch.allclose(ours, gradient, atol=1e-5 * float(gradient.abs().max()))


def test_the_roll_out_draws_from_the_models_distribution() -> None:
    """One draw for each of many equal rows."""
    model, count = toy(), 4000
    noisy = torch.tensor([[3, MASK, 5, 7]]).expand(count, -1).contiguous()
    rows = torch.arange(1, 4 * count, 4)
    draws = torch.from_numpy(np.random.default_rng(0).random(count, dtype=np.float32))
    draws[0] = -1
    rolled = rolled_out(model, noisy, noisy, torch.ones(count), rows, draws, sampled=True)
    assert rolled[0, 1] == MASK
    assert torch.equal(rolled[:, [0, 2, 3]], noisy[:, [0, 2, 3]])
    p = model(noisy[:1])[0, 1].double().softmax(-1)
    share = torch.bincount(rolled[1:, 1], minlength=len(p)).double() / (count - 1)
    assert ((share - p).abs() < 5 * (p * (1 - p) / count).sqrt() + 1e-9).all()
    assert float((p > 0.02).sum()) > 3  # it is no point mass


def test_the_roll_out_takes_no_gradient_away_in_16_bits() -> None:
    """Weights that are cast without gradients must not be used again with them."""
    model, pairs = toy(), some_pairs()
    generator = np.random.default_rng(1)
    uniforms = generator.random(pairs.ids.shape, dtype=np.float32)
    t = np.full(6, 0.75, np.float32)
    [batch] = response_batches(Noise("oput", MASK, EOS, VOCAB), pairs, t, uniforms, uniforms, np.ones(6, bool))
    gradients = []
    for rolls in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if not rolls:
                seen = rolled_out(model, *batch[:3], batch.rollout_index, batch.draws, sampled=False)
        with torch.autocast("cpu", torch.bfloat16):
            rest = {} if rolls else {"noisy_ids": seen, "rollout_index": batch.rollout_index[:0]}
            response_losses(model, *batch._replace(**rest)).sum().backward()
        gradients.append(
            torch.cat([torch.zeros(1) if p.grad is None else p.grad.flatten() for p in model.parameters()])
        )
    assert torch.equal(*gradients)
    assert all(p.grad is not None for p in model.parameters())


def test_uniform_noise_is_uniform_over_every_id_but_the_mask() -> None:
    noise = Noise("uniform", 3, EOS, 8, ratio=(1.0, 1.0))
    pairs = PaddedPairs(np.ones((100, 70), dtype=np.int64), np.zeros(100, dtype=np.int64))
    generator = np.random.default_rng(0)
    draws = generator.random((100, 70), dtype=np.float32)
    [batch] = response_batches(noise, pairs, np.ones(100, np.float32), draws * 0, draws, np.zeros(100, bool))
    counts = torch.bincount(batch.noisy_ids.flatten(), minlength=8)
    assert counts[3] == 0
    assert (counts[[0, 1, 2, 4, 5, 6, 7]] - 1000).abs().max() < 5 * math.sqrt(1000)
    assert len(batch.rollout_index) == 0


# ------------------------------------------------------------------------------------------------------------ batches


def test_prompts_are_never_noisy_and_shares_are_kept() -> None:
    noise = Noise("oput", MASK, EOS, VOCAB, share_on_policy=0.25)
    wide = some_pairs(8, 32)
    batches = ResponseBatches(lambda step: wide, noise, 8, seed=3)
    shares, on_policy = [], []
    for step in range(60):
        [batch] = batches(step)
        noisy = (batch.noisy_ids == MASK).numpy()
        assert not (noisy & ~wide.response).any()
        shares.append(noisy.sum() / wide.response.sum())
        rolled = batch.rollout_index[batch.draws >= 0]
        assert noisy.reshape(-1)[rolled].all()
        on_policy.append(len(set((rolled // 32).tolist())))
    assert abs(np.mean(shares) - 0.75) < 0.02
    assert set(on_policy) <= {1, 2}  # a quarter of eight; two have no masks now and then
    assert np.mean(on_policy) > 1.9


def test_a_quarter_of_two_is_one_half_of_the_time() -> None:
    noise = Noise("oput", MASK, EOS, VOCAB, share_on_policy=0.25, ratio=(1.0, 1.0))
    batches = ResponseBatches(lambda step: some_pairs(2), noise, 2, seed=0)
    counts = [len(set((b.rollout_index[b.draws >= 0] // 12).tolist())) for [b] in map(batches, range(400))]
    assert set(counts) == {0, 1}
    assert abs(np.mean(counts) - 0.5) < 5 * 0.5 / 20


def test_shards_make_up_the_global_batch() -> None:
    noise = Noise("oput", MASK, EOS, VOCAB)
    pairs = some_pairs(8)
    [whole] = ResponseBatches(lambda step: pairs, noise, 8, seed=1)(5)
    parts = [
        part
        for rank in range(2)
        for part in ResponseBatches(lambda step: pairs, noise, 8, 1, rank=rank, world=2, accumulate=2)(5)
    ]
    for k, part in enumerate(parts):
        assert torch.equal(part.noisy_ids, whole.noisy_ids[k::4])
    assert sum(float(part.weights.sum()) for part in parts) == pytest.approx(float(whole.weights.sum()))


def test_an_epoch_has_every_pair_once(tmp_path: Path) -> None:
    pairs = read_pairs(write_pairs(tmp_path / "pairs.jsonl", 10), None, EOS, VOCAB)
    source = Epochs(pairs, 4, EOS, seed=2, multiple=8)
    rows = [tuple(row) for step in range(5) for row in source(step).ids[:, :4].tolist()]
    for epoch in (rows[:10], rows[10:]):
        assert sorted(epoch) == sorted(tuple(pairs.padded(np.arange(10), EOS).ids[n, :4].tolist()) for n in range(10))
    assert rows[:10] != rows[10:]
    assert source(1).ids.shape[1] % 8 == 0


def test_random_length_cuts_its_share_of_steps() -> None:
    pairs = some_pairs(4, 32)
    batches = ResponseBatches(lambda step: pairs, Noise("sft", MASK, EOS, VOCAB), 4, 0, random_length=0.5, multiple=8)
    widths = [batch.noisy_ids.shape[1] for [batch] in map(batches, range(400))]
    counts = {width: widths.count(width) for width in (8, 16, 24, 32)}
    assert sum(counts.values()) == 400
    for width, count in counts.items():
        share = 0.5 / 4 + (0.5 if width == 32 else 0)
        assert abs(count - 400 * share) < 5 * math.sqrt(400 * share * (1 - share))


def test_rows_are_distinct_and_of_few_numbers() -> None:
    sizes = set()
    for seed in range(40):
        chosen = np.random.default_rng(seed).random((64, 512)) < seed / 40
        rows, real = chosen_rows(chosen, 100)
        assert len(set(rows.tolist())) == len(rows)
        assert sorted(rows[real]) == np.flatnonzero(chosen).tolist()
        sizes.add(len(rows))
    assert len(sizes) <= 8


# ----------------------------------------------------------------------------------------------------- files and runs


def write_pairs(path: Path, count: int = 64, seed: int = 0) -> Path:
    """The response counts on from the prompt's last token; lengths differ."""
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        first, size = int(generator.integers(1, 8)), int(generator.integers(1, 5))
        lines.append({"prompt": [first, first + 1], "response": [first + 2 + i for i in range(size)], "nfe": 3})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_files_are_read_and_padded(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": [1, 2], "response": [3, 0, 4, 0, 0]}\n\n{"response": [], "prompt": [5]}\n')
    pairs = read_pairs(path, None, EOS, VOCAB)
    padded = pairs.padded(np.array([1, 0]), EOS, 4)
    assert padded.ids.tolist() == [[5, 0, 0, 0, 0, 0, 0, 0], [1, 2, 3, 0, 4, 0, 0, 0]]
    assert padded.prompt_lengths.tolist() == [1, 2]
    assert pairs.select(np.array([1])).tokens.tolist() == [5, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "not a JSON object"),
        ('{"prompt": [1]}', "not a JSON object"),
        ('{"prompt": "a", "response": "b"}', "give --tokenizer"),
        ('{"prompt": [1], "response": [16]}', "ids from 0 to 15"),
        ('{"prompt": [true], "response": [1]}', "ids from 0 to 15"),
        ("", "has no pairs"),
    ],
)
def test_what_is_no_pair_is_refused_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{{"prompt": [1], "response": [2]}}\n{line}\n' if line else "\n")
    with pytest.raises(ValueError, match=message) as error:
        read_pairs(path, None, EOS, VOCAB)
    assert "line 2" in str(error.value) or not line


def arguments(folder: Path, out: str, **changes: Any) -> list[str]:
    base = folder / "base"
    if not base.exists():
        save_dit(toy(changes.pop("block_causal", None)), base)
        write_pairs(folder / "pairs.jsonl")
    settings: dict[str, Any] = {
        "model": base, "data": folder / "pairs.jsonl", "out": folder / out, "batch-size": 8, "epochs": 2, "lr": 1e-2,
        "warmup": 2, "eval-samples": 32, "round-to": 4, "device": "cpu", "workers": 1, "objective": "oput",
    }  # fmt: skip
    settings |= {key.replace("_", "-"): value for key, value in changes.items()}
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


@pytest.mark.parametrize("objective", ["sft", "oput", "masked", "uniform"])
@pytest.mark.parametrize("block_causal", [None, 4])
def test_a_run_learns(tmp_path: Path, objective: str, block_causal: int | None) -> None:
    command = arguments(tmp_path, "run", objective=objective, epochs=8, block_causal=block_causal, random_length=0.1)
    assert finetune.main(command) == 0
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    most = 0.8 if objective == "uniform" else 0.7  # it sees no masks
    assert found["after"]["nelbo_nats_per_response"] < most * found["before"]["nelbo_nats_per_response"]
    by_kind = [found[when]["by_kind"]["end of text"] for when in ("before", "after")]
    assert by_kind[1] < by_kind[0]
    assert load_dit(tmp_path / "run" / "final").config.block_causal == block_causal


@pytest.mark.parametrize("rollout", ["argmax", "sample"])
def test_a_run_in_two_pieces_is_the_run_in_one(tmp_path: Path, rollout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finetune.main(arguments(tmp_path, "whole", rollout=rollout)) == 0
    assert finetune.main([*arguments(tmp_path, "pieces", rollout=rollout), "--stop-after", "0.000001"]) == 0
    assert not (tmp_path / "pieces" / "final").exists()
    assert 0 < len(losses(tmp_path / "pieces")) < len(losses(tmp_path / "whole"))
    assert finetune.main([*arguments(tmp_path, "pieces", rollout=rollout), "--resume", "must"]) == 0
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
    ours, whole = (load_dit(tmp_path / name / "final").state_dict() for name in ("pieces", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    finetune.main(arguments(tmp_path, "one"))
    two_processes("training.finetune", arguments(tmp_path, "two"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "sft", "tail": 3}, "--tail has no effect with --objective sft"),
        ({"objective": "masked", "share_on_policy": 0.25}, "--share-on-policy has no effect"),
        ({"ratio": 1.5}, "--ratio must be a share"),
        ({"length": 5}, "--drop-long"),
        ({"valid": "held-out.jsonl", "valid_share": 0.2}, "--valid-share has no effect with --valid"),
        ({"valid_share": 0.999}, "none is left to train on"),
        ({"batch_size": 9, "grad_accum": 2}, "does not divide"),
    ],
)
def test_arguments_that_cannot_work_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        finetune.main(arguments(tmp_path, "run", **changes))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_start_is_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune.main([*arguments(tmp_path, "run"), "--stop-after", "0.000001"])
    save_dit(toy(seed=1), tmp_path / "base")
    with pytest.raises(SystemExit):
        finetune.main(arguments(tmp_path, "run"))
    assert "start_sha256" in capsys.readouterr().err
