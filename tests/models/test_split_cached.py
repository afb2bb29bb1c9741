"""Keys and values kept for people's own models: windows of sequences, and whole runs over kept keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mdkern import decoders
from tests.problems.hf_models import (
    CACHED,
    MASK,
    MODELS,
    adapted,
    bert,
    draw,
    dream,
    llada,
    llama,
    qwen,
    random_ids,
    starts,
)
from tests.references import stale_cache
from tests.references.slow_sampler import decode


class StaleDecoder:
    """A decoder of transformers on one sequence with keys and values of mixed age, by transformers' own cache.

    What is outside the window is past, what is inside is new; the attention does not mind the order.
    """

    def __init__(self, model: Any) -> None:
        self.whole, self.model = model, self
        self.seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by (layer, column)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.whole.lm_head(hidden)

    def hidden(self, ids: Sequence[int], columns: Sequence[int], t: float | None = None) -> Tensor:
        """Of a shifted model the states of the columns before, the first of which runs but is not kept."""
        shifted, layers = self.whole.config.model_type == "Dream", len(self.whole.model.layers)
        extra = [max(columns[0] - 1, 0)] if shifted else []
        past = [column for column in range(len(ids)) if column not in columns]
        cache = DynamicCache(config=None)
        for layer in range(layers) if past else ():
            cache.update(*(torch.cat(x, 2) for x in zip(*(self.seen[layer, column] for column in past))), layer)
        run = [*extra, *columns]
        mask = torch.ones(1, 1, len(run), len(past) + len(run), dtype=torch.bool)
        if shifted:
            mask[..., len(past)] = False
        place = torch.tensor([run])
        states = self.whole.model(
            torch.tensor([[ids[column] for column in run]]), mask, place, past_key_values=cache, use_cache=True
        )[0][0]
        for layer in range(layers):
            keys, values = (
                x[:, :, len(past) + len(extra) :] for x in (cache.layers[layer].keys, cache.layers[layer].values)
            )
            for number, column in enumerate(columns):
                self.seen[layer, column] = keys[:, :, number : number + 1], values[:, :, number : number + 1]
        if not shifted:
            return states
        return torch.cat((states[1:2] if columns[0] == 0 else states[:1], states[1:-1]))


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.slow
class TestCache:
    @pytest.mark.parametrize("name", CACHED)
    def test_a_block_in_one_step_is_exact(self, name: str, cache: str) -> None:
        denoiser = adapted(MODELS[name]())
        plain, out = (
            draw(denoiser, cache=c, decoder="top_probability", steps=None, steps_per_block=1) for c in ("none", cache)
        )
        assert out.sequences.equal(plain.sequences)

    @pytest.mark.parametrize("name", CACHED)
    def test_a_block_that_is_the_whole_sequence_is_exact(self, name: str, cache: str) -> None:
        denoiser = adapted(MODELS[name]())
        holes = torch.where(torch.arange(12) % 4 == 2, random_ids(4, 12), MASK)
        options: dict[str, Any] = {"decoder": "threshold", "block_length": 12, "input_ids": holes}
        plain, out = (draw(denoiser, cache=c, **options) for c in ("none", cache))
        assert out.sequences.equal(plain.sequences)
        assert out.nfe["H"].equal(plain.nfe["H"])

    @pytest.mark.parametrize("guidance_scale", [0.0, 1.5])
    @pytest.mark.parametrize(
        "make", [lambda: dream(1), lambda: llada(layers=1), lambda: llama(layers=1), lambda: bert(num_hidden_layers=1)]
    )
    def test_one_layer_is_exact(self, make: Callable[[], nn.Module], cache: str, guidance_scale: float) -> None:
        """Its keys and values depend on their own column's id alone, which changes only in the window."""
        denoiser = adapted(make())
        options = {"decoder": "threshold", "temperature": 0.7, "guidance_scale": guidance_scale}
        plain, out = (draw(denoiser, cache=c, **options) for c in ("none", cache))
        assert out.sequences.equal(plain.sequences)
        assert out.nfe["H"].equal(plain.nfe["H"])

    @pytest.mark.parametrize("name", ["llama", "dream", "llada, grouped"])
    def test_padding_changes_nothing(self, name: str, cache: str) -> None:
        denoiser = adapted(MODELS[name]())
        options = {"cache": cache, "decoder": "top_probability", "steps": 12}
        whole = draw(denoiser, **options)
        ids = torch.nn.functional.pad(starts(5), (3, 2), value=3)
        mask = torch.nn.functional.pad(torch.ones_like(starts(5)), (3, 2))
        out = draw(denoiser, input_ids=ids, attention_mask=mask, **options)
        assert out.sequences[:, 3:15].equal(whole.sequences)

    @pytest.mark.parametrize("make", [llama, qwen, dream])
    def test_as_stale_as_the_slow_loop(
        self, make: Callable[[], nn.Module], cache: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every pass has exactly the keys and values that it should: those of transformers' own cache, by hand."""
        monkeypatch.setattr(stale_cache, "StaleDiT", StaleDecoder)
        model, ids, decoder = make(), starts(8), decoders.Threshold(0.6)
        model.config.time_conditioning = False
        out = draw(model, input_ids=ids, decoder=decoder, cache=cache)
        uncached = draw(model, input_ids=ids, decoder=decoder)
        assert not out.sequences.equal(uncached.sequences)  # so that something was stale
        for number, row in enumerate(ids.tolist()):
            start = row.index(MASK)
            slow = stale_cache.BlockwiseCache(
                {"H": model}, "H" * 12, start, 4, MASK, cache == "dual", None, torch.ones(12)
            )
            block = [(i - start) // 4 if token == MASK else -1 for i, token in enumerate(row)]

            def allowed(ids: Sequence[int], step: int, slow: Any = slow) -> dict[int, list[float]]:
                return {
                    column: [-torch.inf if word == MASK else value for word, value in enumerate(logits)]
                    for column, logits in slow.logits(ids, step).items()
                }

            with torch.no_grad():
                outcome = decode(
                    allowed, row, decoder, steps=12, mask_id=MASK, block=block, temperature=1.0, seed=7,
                    sample=number,
                )  # fmt: skip
            assert out.sequences[number].tolist() == outcome.ids
            assert int(out.nfe["H"][number]) == outcome.passes


@pytest.mark.parametrize(
    ("make", "shifted"),
    [
        (lambda: llama(layers=1), False),
        (lambda: llama(layers=1), True),
        (lambda: llada(layers=1, kv_heads=2), False),
        (lambda: llada(layers=1), True),
        (lambda: bert(num_hidden_layers=1), False),
    ],
)
@torch.no_grad()
def test_windows_over_ids_that_change(make: Callable[[], nn.Module], shifted: bool) -> None:
    """One layer's keys and values know their own id alone, so that windows give what full passes give.

    The first windows begin at the start of a text, before which there is nothing or padding; the last one ends past it.
    """
    denoiser, ids, length = adapted(make(), shifted=shifted), random_ids(2, 12), 12
    mask = torch.arange(length) >= torch.tensor([[0], [2]])
    cache = torch.full(denoiser.cache_shape(2, length), torch.nan)  # none of it may be read before it is filled
    every = torch.arange(length).expand(2, -1)
    filled = denoiser.window_hidden(cache, ids, None, every, None, mask)
    torch.testing.assert_close(filled[mask], denoiser.hidden(ids, None, None, mask)[mask], rtol=1e-4, atol=1e-5)
    for number in range(3):
        columns = (torch.tensor([[0], [2]]) + 4 * number + torch.arange(4)).clamp(max=length)
        inside, positions = columns.clamp(max=length - 1), torch.tensor([[0, 1, 3], [1, 0, 1]])
        new = random_ids(2, length, seed=number + 1)
        ids = torch.where(torch.zeros_like(ids).scatter(1, inside, 1).bool(), new, ids)
        rows = denoiser.window_hidden(cache, ids.gather(1, inside), columns, positions, None, mask)
        expected = denoiser.hidden(ids, None, inside.gather(1, positions), mask)
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)
