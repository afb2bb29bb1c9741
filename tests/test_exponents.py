"""Learning of GenMD4's exponents: the bound, its gradient by enumeration, and a model for which an order is better."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mdkern
from mdkern.decoders import GenMD4
from tests.conftest import random_dit
from training import exponents as command
from training.checkpoint import load_checkpoint
from training.exponents import bounds, compare, integrand, log_mask, losses_of, surrogate, train

SETS = [torch.tensor(masked) for masked in itertools.product([False, True], repeat=3)]
TABLE = {
    tuple(masked.tolist()): torch.rand(3, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    for number, masked in enumerate(SETS)
}


def mean_integrand(exponents: Tensor, t: Tensor) -> Tensor:
    """The mean over all sets of masks, each with its probability written out: ``[T]``."""
    total = torch.zeros_like(t)
    for masked in SETS:
        chance = torch.ones_like(t)
        for i, hidden in enumerate(masked.tolist()):
            chance = chance * (t ** exponents[i] if hidden else 1 - t ** exponents[i])
        loss = sum(
            exponents[i] / t * TABLE[tuple(masked.tolist())][i] for i, hidden in enumerate(masked.tolist()) if hidden
        )
        total = total + chance * loss
    return total


def test_the_gradient_is_that_of_the_mean() -> None:
    exponents = torch.tensor([0.6, 1.0, 2.3], dtype=torch.float64, requires_grad=True)
    for time in (0.1, 0.5, 0.9):
        t = torch.tensor([time], dtype=torch.float64)
        (want,) = torch.autograd.grad(mean_integrand(exponents, t).sum(), exponents)
        estimate = torch.zeros(1, dtype=torch.float64)
        for one, other in itertools.product(SETS, SETS):
            masks = one[None], other[None]
            weight = (log_mask(exponents, t, masks[0]) + log_mask(exponents, t, masks[1])).exp().detach()
            losses = tuple(TABLE[tuple(masked.tolist())][None] for masked in (one, other))
            estimate = estimate + weight * surrogate(exponents, t, masks, losses)
        (got,) = torch.autograd.grad(estimate.sum(), exponents)
        torch.testing.assert_close(got, want)


def test_the_bound_does_not_change_with_the_scale_and_is_that_of_the_orders() -> None:
    """Over all times the integral is the mean over orders of what the tokens cost in that order."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for scale in (1.0, 2.5):
        exponents = scale * torch.tensor([0.6, 1.0, 2.3], dtype=torch.float64)
        t = u**2  # denser at small times, where small exponents have their mass
        integral = float((mean_integrand(exponents, t) * 2 * u).mean())
        total = 0.0
        for order in itertools.permutations(range(3)):  # revealed first to last; times fall from 1
            chance, left = 1.0, {0, 1, 2}
            for i in order:  # the largest of variables with laws t^w is i with probability w_i / sum
                chance *= float(exponents[i] / sum(exponents[j] for j in left))
                left.remove(i)
            hidden = {0, 1, 2}
            for i in order:
                total += chance * float(TABLE[tuple(j in hidden for j in range(3))][i])
                hidden.remove(i)
        assert integral == pytest.approx(total, rel=1e-4)


def test_masks_have_the_probability_of_the_decoder() -> None:
    """`GenMD4` reveals a position at a step when it goes from masked to not masked at that time."""
    w = torch.tensor([0.5, 1.0, 3.0])
    out = mdkern.sample(
        random_dit(num_blocks=1), num_samples=4000, length=3, steps=2, decoder=GenMD4(w), seed=0, batch_size=500,
        return_history=True,
    )  # fmt: skip
    masked = (out.history.step > 0).double().mean(0)  # at t = 1/2
    chance = torch.stack(
        [log_mask(w[i : i + 1], torch.tensor([0.5]), torch.tensor([[True]])).exp()[0] for i in range(3)]
    )
    assert masked.tolist() == pytest.approx(chance.tolist(), abs=0.03)


def first_one_tells(ids: Tensor, masked: Tensor, t: Tensor) -> Tensor:
    """Position 0 is free to guess; the others cost little once it is known and much before."""
    known = ~masked[:, :1]
    cost = torch.where(known, 0.1, 1.0).expand(ids.shape).clone()
    cost[:, 0] = 0.5
    return torch.where(masked, cost, 0.0)


def windows(generator: np.random.Generator) -> Tensor:
    return torch.from_numpy(generator.integers(0, 5, (64, 6)))


def test_what_helps_the_others_comes_first_and_a_stopped_run_goes_on() -> None:
    kept: list[Any] = []
    found = train(first_one_tells, windows, 6, 0, 120, 0.05, keep=kept.append, keep_every=50)
    assert found.log().mean() == pytest.approx(0.0, abs=1e-5)
    assert int(found.argmax()) == 0
    assert found[0] > 2 * found[1:].max()
    again = train(first_one_tells, windows, 6, 0, 120, 0.05, state=kept[0])
    assert [state["step"] for state in kept] == [50, 100, 120]
    assert torch.equal(again, found)
    row = compare(first_one_tells, windows(np.random.default_rng(1)).repeat(8, 1), found, 0, 64)
    assert row["difference"] < -3 * row["standard_error"] < 0


def test_at_equal_exponents_it_is_the_plain_bound() -> None:
    denoiser = mdkern.adapt(random_dit())
    ids = torch.randint(10, (5, 16), generator=torch.Generator().manual_seed(0))
    masked, t = torch.rand(5, 16, generator=torch.Generator().manual_seed(1)) < 0.5, torch.full((5,), 0.5)
    losses = losses_of(denoiser)(ids, masked, t)
    log_p = denoiser.logits(torch.where(masked, 10, ids)).log_softmax(-1)
    want = -log_p.gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(losses, torch.where(masked, want, 0.0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        integrand(torch.ones(16), t, masked, losses), 2 * torch.where(masked, want, 0.0).sum(-1), atol=1e-4, rtol=1e-5
    )
    assert torch.equal(
        bounds(losses_of(denoiser), ids, torch.ones(16), 3, 2), bounds(losses_of(denoiser), ids, torch.ones(16), 3, 2)
    )


def token_file(path: Path, seed: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, 10, 400).astype(np.uint16)
    path.write_bytes(tokens.tobytes())
    import hashlib

    described = {
        "dtype": "uint16", "count": 400, "vocab_size": 11, "eos_id": 0, "mask_id": 10, "tokenizer_sha256": "x",
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(), "text_bytes": 1, "sources": [],
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(described))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_dit().save_pretrained(tmp_path / "model")
    for number, name in enumerate(("train", "valid")):
        token_file(tmp_path / f"{name}.bin", number)
    arguments = [
        "--model", str(tmp_path / "model"), "--data", str(tmp_path / "train.bin"), "--valid",
        str(tmp_path / "valid.bin"), "--out", str(tmp_path / "run"), "--length", "8", "--batch-size", "4",
        "--eval-samples", "12", "--device", "cpu",
    ]  # fmt: skip
    assert command.main([*arguments, "--steps", "3"]) == 0
    assert "held out: " in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run")["step"] == 3
    assert command.main([*arguments, "--steps", "5"]) == 0
    stopped = (tmp_path / "run" / "exponents.txt").read_text()
    arguments[7] = str(tmp_path / "whole")
    assert command.main([*arguments, "--steps", "5"]) == 0
    assert (tmp_path / "whole" / "exponents.txt").read_text() == stopped
    exponents = torch.tensor([float(line) for line in stopped.split()])
    assert not (mdkern.sample(random_dit(), length=8, decoder=GenMD4(exponents), seed=0).sequences == 10).any()
    with pytest.raises(SystemExit):
        command.main([*arguments, "--steps", "5", "--seed", "1"])
    assert "is of another run (seed: 0 there, 1 here)" in capsys.readouterr().err
