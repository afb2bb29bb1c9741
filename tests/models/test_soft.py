"""Soft inputs: what is mixed, bit for bit where nothing is, and by every way in which models are run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mdkern
from mdkern.models import DiT, adapt
from mdkern.models.soft import mixture, soften
from tests.conftest import random_dit
from tests.problems.hf_models import CACHED, MODELS, adapted, bert, random_ids

LENGTH = 12


def exact_mixture(token: list[float], mask: list[float], p: float) -> list[float]:
    """The formula of DMax's code in plain Python."""
    mixed = [p * a + (1 - p) * b for a, b in zip(token, mask)]
    size = p * math.hypot(*token) + (1 - p) * math.hypot(*mask)
    return [x * size / (math.hypot(*mixed) + 1e-6) for x in mixed]


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Some of them 1."""
    drawn = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn > 0.7, 1.0, drawn)


class TestMixture:
    MASK = torch.tensor([0.0, -1.0])

    @pytest.mark.parametrize(
        ("token", "p", "expected"),
        [
            ([0.0, 2.0], 0.80, [0.0, 1.799999]),
            ([-3.0, 4.0], 0.55, [-2.195240, 2.328285]),
            ([0.0, 2.0], 0.85, [0.0, 1.849999]),
            ([1.0, 0.0], 0.60, [0.832049, -0.554699]),
            ([1.0, 0.0], 0.48, [0.678279, -0.734802]),
            ([1.0, 0.0], 0.70, [0.919144, -0.393919]),
            ([-3.0, 4.0], 0.62, [-2.307362, 2.605086]),
            ([2.0, 2.0], 0.85, [1.887413, 1.720876]),
        ],
    )
    def test_worked_examples(self, token: list[float], p: float, expected: list[float]) -> None:
        mixed = mixture(torch.tensor([token]), self.MASK, torch.tensor([p]))
        assert mixed[0].tolist() == pytest.approx(expected, abs=1e-6)
        assert mixed[0].tolist() == pytest.approx(exact_mixture(token, self.MASK.tolist(), p), abs=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_random_rows(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, mask = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((50, 8), (8,)))
        p = weights(1, 50)[0]
        mixed = mixture(rows, mask, p)
        assert mixed.dtype == dtype
        want = [exact_mixture(row, mask.tolist(), float(share)) for row, share in zip(rows.tolist(), p)]
        assert torch.equal(mixed[p == 1], rows[p == 1])
        torch.testing.assert_close(mixed[p < 1], torch.tensor(want, dtype=dtype)[p < 1])

    def test_only_the_positions_named_are_mixed(self) -> None:
        embedded = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
        positions = torch.tensor([[0, 1, 2], [4, 5, 5]])  # blocks reach past the end
        weight = torch.tensor([[0.5, 1.0, 0.25], [0.75, 0.5, 0.5]])
        mixed = soften(embedded, embedded[0, 0], weight, positions)
        whole = torch.ones(2, 6).scatter(1, positions, weight)
        assert torch.equal(mixed, soften(embedded, embedded[0, 0], whole, None))
        assert torch.equal((mixed == embedded).all(-1), whole == 1)


def wide(model: DiT, rows: Tensor) -> DiT:
    """The same model with ``rows [n, D]`` as further ids, from number 64 on."""
    config = model.config
    more = random_dit(**{**vars(config), "vocab_size": 64 + len(rows)})
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(("embedding", "head"))}
    more.load_state_dict(state, strict=False)
    with torch.no_grad():
        more.embedding[: len(model.embedding)] = model.embedding
        more.embedding[64 : 64 + len(rows)] = rows
    return more


class TestDiT:
    MODEL = random_dit(num_blocks=2)

    @torch.no_grad()
    def test_inputs_are_the_mixtures(self) -> None:
        """A model that has an id for every mixture says what is expected."""
        model, ids, weight = self.MODEL, random_ids(2, LENGTH) % 10, weights(2, LENGTH)
        mask = model.embedding[10].tolist()
        rows = [
            exact_mixture(model.embedding[token].tolist(), mask, float(p)) if p < 1 else model.embedding[token].tolist()
            for token, p in zip(ids.flatten().tolist(), weight.flatten())
        ]
        positions = torch.arange(3, 9).expand(2, -1)
        numbers = 64 + torch.arange(2 * LENGTH).view(2, LENGTH)
        larger, denoiser = wide(model, torch.tensor(rows)), adapt(model)
        torch.testing.assert_close(denoiser.softened(weight).hidden(ids), larger.hidden(numbers), atol=1e-5, rtol=1e-5)
        some = torch.where((torch.arange(LENGTH) >= 3) & (torch.arange(LENGTH) < 9), numbers, ids)
        torch.testing.assert_close(
            denoiser.softened(weight[:, 3:9]).hidden(ids, None, positions),
            larger.hidden(some, None, positions),
            atol=1e-5,
            rtol=1e-5,
        )

    @torch.no_grad()
    @pytest.mark.parametrize("changes", [{}, {"time_conditioning": True}, {"block_causal": 4}])
    def test_whole_tokens_are_the_plain_pass_in_all_bits(self, changes: dict[str, Any]) -> None:
        denoiser = adapt(random_dit(**changes))
        ids, t = random_ids(3, LENGTH) % 11, torch.tensor([0.9, 0.5, 0.1])
        positions = torch.arange(2, 6).expand(3, -1)
        ones = torch.ones(3, 4)
        assert torch.equal(denoiser.softened(ones).hidden(ids, t, positions), denoiser.hidden(ids, t, positions))
        assert torch.equal(denoiser.softened(torch.ones(3, LENGTH)).hidden(ids, t), denoiser.hidden(ids, t))
        soft, plain = windows(denoiser, ids, ones, t), windows(denoiser, ids, None, t)
        assert all(torch.equal(a, b) for a, b in zip(soft, plain))

    @torch.no_grad()
    def test_windows_see_what_whole_passes_see(self) -> None:
        """One transformer block has exact windows."""
        denoiser, ids = adapt(random_dit(num_blocks=1)), random_ids(3, LENGTH) % 11
        check_windows(denoiser, ids)


def windows(denoiser: mdkern.Denoiser, ids: Tensor, weight: Tensor | None, t: Tensor | None = None) -> list[Tensor]:
    """The states at columns 4 to 7 from a pass that fills a cache and one of a window, and the cache."""
    rows, length = ids.shape
    cache = torch.zeros(denoiser.cache_shape(rows, length), dtype=denoiser.dtype)
    soft = denoiser if weight is None else denoiser.softened(weight)
    columns = torch.arange(4, 8).expand(rows, -1)
    first = soft.window_hidden(cache, ids, None, columns, t)
    filled = cache.clone()
    second = soft.window_hidden(cache, ids.gather(1, columns), columns, (columns - 4), t)
    return [first, filled, second, cache]


def check_windows(denoiser: mdkern.Denoiser, ids: Tensor) -> None:
    weight = weights(len(ids), 4)
    columns = torch.arange(4, 8).expand(len(ids), -1)
    whole = denoiser.softened(weight).hidden(ids, None, columns)
    first, _, second, _ = windows(denoiser, ids, weight)
    torch.testing.assert_close(first, whole, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(second, whole, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(whole, denoiser.hidden(ids, None, columns), atol=1e-3)


class TestHuggingFace:
    @torch.no_grad()
    @pytest.mark.parametrize("name", MODELS)
    def test_every_stand_in(self, name: str) -> None:
        denoiser = adapted(MODELS[name]())
        assert denoiser.takes_soft, denoiser.no_soft_reason
        ids = random_ids(2, LENGTH)
        ones = torch.ones(2, LENGTH)
        assert torch.equal(denoiser.softened(ones).hidden(ids), denoiser.hidden(ids))
        none = ones.clone()
        none[:, 5:7] = 0.0
        masked = ids.clone()
        masked[:, 5:7] = denoiser.mask_id
        torch.testing.assert_close(denoiser.softened(none).hidden(ids), denoiser.hidden(masked), atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    @pytest.mark.parametrize("name", CACHED)
    def test_windows(self, name: str) -> None:
        denoiser, ids = adapted(MODELS[name]()), random_ids(2, LENGTH)
        soft, plain = windows(denoiser, ids, torch.ones(2, 4)), windows(denoiser, ids, None)
        assert all(torch.equal(a, b) for a, b in zip(soft, plain))
        weight = weights(2, 4)
        columns = torch.arange(4, 8).expand(2, -1)
        whole = denoiser.softened(weight).hidden(ids, None, columns)
        assert not torch.allclose(whole, denoiser.hidden(ids, None, columns), atol=1e-3)
        first, _, second, _ = windows(denoiser, ids, weight)
        torch.testing.assert_close(first, whole, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(second, whole, atol=2e-4, rtol=2e-4)  # the cache has what the window gives anew

    @torch.no_grad()
    def test_the_mixtures_of_the_embedding(self) -> None:
        """BERT takes embeddings as well as ids."""
        model, ids, weight = bert(), random_ids(2, LENGTH), weights(2, LENGTH)
        denoiser = adapted(model)
        table = model.get_input_embeddings().weight
        mask = table[denoiser.mask_id].tolist()
        rows = [
            exact_mixture(table[token].tolist(), mask, float(p)) if p < 1 else table[token].tolist()
            for token, p in zip(ids.flatten().tolist(), weight.flatten())
        ]
        logits = model(inputs_embeds=torch.tensor(rows).view(2, LENGTH, -1)).logits
        ours = denoiser.head.logits(denoiser.softened(weight).hidden(ids))
        open_ids = denoiser.head.bias != -torch.inf
        torch.testing.assert_close(ours[..., open_ids], logits[..., open_ids], atol=1e-4, rtol=1e-4)


class Looked(nn.Module):
    """A model that reads its ids in a way of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.other, self.out = nn.Embedding(9, 8), nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.how = how

    def get_output_embeddings(self) -> nn.Linear:
        return self.out

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table.weight[input_ids] if self.how == "indexed" else self.table(input_ids)
        if self.how == "twice":
            x = x + self.other(input_ids)
        if self.how == "ids":
            x = x + input_ids[..., None] / 9
        return self.out(x + x.mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("", ""),
        ("indexed", "its forward looks up its ids 0 times, not once"),
        ("twice", "its forward looks up its ids 2 times, not once"),
        ("ids", "ids that are mixed with the mask to nothing but the mask do not give what the mask gives"),
    ],
)
def test_models_that_look_at_ids_otherwise_are_refused(how: str, reason: str) -> None:
    model = Looked(how).eval()
    denoiser = mdkern.adapt(model, vocab_size=9, mask_id=8, max_length=LENGTH)
    assert (denoiser.takes_soft, denoiser.no_soft_reason) == (not reason, reason)
    options = {"length": 6, "decoder": "soft_parallel", "temperature": 0.0, "seed": 0}
    if not reason:
        assert not (mdkern.sample(denoiser, **options).sequences == 8).any()
        return
    with pytest.raises(ValueError, match=f"model H .* cannot take them because {reason}.*soft=False runs with any"):
        mdkern.sample(denoiser, **options)


SHAPE: dict[str, Any] = {"vocab_size": 70, "mask_id": 69, "max_length": 64, "width": 64, "num_heads": 2}


@pytest.mark.gpu
class TestGpu:
    @torch.no_grad()
    @pytest.mark.parametrize("batch", [2, 128])  # the second has folded weights on Hopper's cards
    def test_fused_passes(self, batch: int) -> None:
        model = random_dit(**SHAPE).to("cuda", torch.bfloat16)
        ids = torch.randint(69, (batch, 64), generator=torch.Generator().manual_seed(0)).cuda()
        denoiser = adapt(model).prepared(ids.numel())
        positions = torch.arange(10, 30, device="cuda").expand(batch, -1)
        plain = denoiser.hidden(ids, None, positions)
        whole = denoiser.softened(torch.ones(batch, 20, device="cuda")).hidden(ids, None, positions)
        if getattr(denoiser, "folds", None) is None:
            assert torch.equal(whole, plain)
        else:  # the first block's product is computed in place of being looked up
            assert (whole.float() - plain.float()).square().mean() < 1e-4 * plain.float().square().mean()
        weight = weights(batch, 20).cuda()
        soft = denoiser.softened(weight).hidden(ids, None, positions).float()
        exact = random_dit(**SHAPE).double().cuda()
        want = exact.plain_hidden(ids, None, positions, weight=weight)
        reference = model.plain_hidden(ids, None, positions, weight=weight)
        error, allowed = ((x.double() - want).square().mean() for x in (soft, reference))
        assert error < 4 * allowed
        cache = torch.zeros(denoiser.cache_shape(batch, 64), dtype=torch.bfloat16, device="cuda")
        filled = denoiser.softened(weight).window_hidden(cache, ids, None, positions).float()
        inside = torch.arange(20, device="cuda").expand(batch, -1)
        window = denoiser.softened(weight).window_hidden(cache, ids.gather(1, positions), positions, inside).float()
        for other in (filled, window):
            assert (other - soft).square().mean() < 1e-3 * soft.square().mean()
