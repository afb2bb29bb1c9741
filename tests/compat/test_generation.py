"""mdkern as the decoding method of transformers' own ``generate``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

import mdkern
from mdkern import decoders
from tests.problems.hf_models import MASK, llada, llama, qwen, random_ids

MODEL = qwen(eos_token_id=None)
PROMPT = random_ids(2, 5)


def start(prompt: Tensor, count: int = 8) -> Tensor:
    return torch.nn.functional.pad(prompt, (0, count), value=MASK)


def theirs(**options: Any) -> Any:
    """By transformers' ``generate``, its cache left out for the model's sake."""
    return MODEL.generate(PROMPT, custom_generate=mdkern.generate, max_new_tokens=8, **options)


def test_greedy_text_is_that_of_sample() -> None:
    out = theirs(block_length=4, cache="dual")
    options: dict[str, Any] = {"block_length": 4, "cache": "dual", "temperature": 0.0, "decoder": "top_probability"}
    assert out.equal(mdkern.sample(MODEL, input_ids=start(PROMPT), **options).sequences)
    assert out[:, :5].equal(PROMPT)


def test_drawn_text_is_that_of_sample_and_the_filters_act_once() -> None:
    options: dict[str, Any] = {"temperature": 0.7, "top_k": 6, "top_p": 0.9}
    out = theirs(do_sample=True, seed=3, decoder=decoders.Entropy(), num_return_sequences=2, **options)
    want = mdkern.sample(MODEL, input_ids=start(PROMPT.repeat_interleave(2, 0)), decoder="entropy", seed=3, **options)
    assert out.equal(want.sequences)


def test_prompts_padded_on_the_left() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    out = theirs(attention_mask=mask, steps=8)
    alone = mdkern.generate(MODEL, PROMPT[:1, 2:], max_new_tokens=8, steps=8)
    assert isinstance(alone, Tensor)
    assert out[0, 5:].equal(alone[0, 3:])


def test_processors_ends_and_results_of_transformers() -> None:
    told = theirs(suppress_tokens=[4, 9], eos_token_id=[3, 5], return_dict_in_generate=True)
    assert isinstance(told, mdkern.SampleOutput)
    assert told.sequences is not None
    written = told.sequences[:, 5:]
    assert not ((written == 4) | (written == 9)).any()
    for row in written.tolist():
        ends = [place for place, token in enumerate(row) if token in (3, 5)]
        assert not ends or set(row[ends[0] :]) == {row[ends[0]]}
    called = []

    def stop(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        called.append(input_ids.shape)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    theirs(stopping_criteria=StoppingCriteriaList([stop]), eos_token_id=3)  # type: ignore[list-item]
    assert called


def test_a_streamer_is_given_each_text() -> None:
    class Kept:
        def __init__(self) -> None:
            self.parts: list[list[int]] = []

        def put(self, ids: Tensor) -> None:
            self.parts.append(ids.tolist())

        def end(self) -> None: ...

    kept = Kept()
    out = theirs(text_streamer=kept)
    assert sorted(kept.parts[::2]) == sorted(PROMPT.tolist())
    assert sorted(kept.parts[1::2]) == sorted(out[:, 5:].tolist())


def test_a_light_model_takes_part() -> None:
    light = qwen(seed=5, eos_token_id=None)
    out = theirs(light=light, schedule="L2 H4 L2", steps=8, decoder="ancestral", return_dict_in_generate=True, seed=0)
    want = mdkern.sample(MODEL, light, "L2 H4 L2", input_ids=start(PROMPT), temperature=0.0, seed=0)
    assert out.sequences.equal(want.sequences)
    assert set(out.nfe) == {"H", "L"}


def test_by_itself_for_models_without_generate() -> None:
    model = llada()
    out = mdkern.generate(model, PROMPT, max_new_tokens=6, do_sample=True, num_return_sequences=2, steps=6, seed=1)
    want = mdkern.sample(
        model,
        input_ids=start(PROMPT.repeat_interleave(2, 0), 6),
        decoder="top_probability",
        steps=6,
        seed=1,
        stop_at_eos=True,
        top_k=GenerationConfig().top_k,  # transformers 4 has 50 there, more than there are ids
    )
    assert isinstance(out, Tensor)
    assert out.equal(want.sequences)
    greedy = GenerationConfig(max_new_tokens=6)
    for one in (model, mdkern.adapt(model)):
        assert mdkern.generate(one, PROMPT, generation_config=greedy, steps=6).shape == (2, 11)  # type: ignore[union-attr]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "num_beams must be 1"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores could have no effect"),
    "guidance": ({"guidance_scale": 2.0}, "guidance_scale of transformers compares"),
    "processor": ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
    "decoder": ({"decoder": "best"}, "decoder 'best' is not known"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        theirs(**options)


def test_what_cannot_work_by_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be given"):
        mdkern.generate(MODEL, PROMPT)
    with pytest.raises(ValueError, match="max_length must be above the prompt's 5 tokens"):
        mdkern.generate(MODEL, PROMPT, max_length=5)
    with pytest.raises(ValueError, match="step could have no effect"):
        mdkern.generate(MODEL, PROMPT, max_new_tokens=2, step=1)
    with pytest.raises(ValueError, match=r"give them to mdkern\.adapt"):
        mdkern.generate(mdkern.adapt(MODEL), PROMPT, max_new_tokens=2, mask_id=4)


def test_a_causal_model_is_refused_with_the_reason() -> None:
    model = llama(is_causal=True)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True
    with pytest.raises(ValueError, match="looks to the left only"):
        model.generate(PROMPT, custom_generate=mdkern.generate, max_new_tokens=2)
