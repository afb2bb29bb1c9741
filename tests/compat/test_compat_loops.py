"""`mdkern.compat` writes the tokens of the published loops, and refuses what could have no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mdkern
from mdkern import decoders
from mdkern.compat import dream, fast_dllm, llada
from mdkern.decoders.block_start import StartedEntropy, StartedThreshold
from tests.problems.checkpoints import make_tokenizer, save
from tests.problems.hf_models import MASK, WORDS, bert, random_ids
from tests.problems.hf_models import dream as make_dream
from tests.problems.hf_models import llada as make_llada
from tests.references import decoding_rules as rules
from tests.references import published_loops as loops

LLADA, DREAM = make_llada(), make_dream()
OF_LLADA = loops.logits_function(LLADA, WORDS, MASK)
OF_DREAM = loops.logits_function(DREAM, WORDS, MASK, shifted=True)
PROMPT = random_ids(1, 5)


def padded(lengths: list[int]) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Prompts of these lengths, padded on the left: ids, attention mask, and each as a list."""
    ids, width = random_ids(len(lengths), max(lengths), seed=3), max(lengths)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids.where(mask == 1, 1), mask, [row[width - n :].tolist() for row, n in zip(ids, lengths)]


@pytest.mark.parametrize(("length", "block", "steps"), [(8, 8, 8), (12, 4, 12), (12, 4, 6), (8, 8, 3), (8, 4, 12)])
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_llada(length: int, block: int, steps: int, scale: float) -> None:
    want, _ = loops.in_blocks(OF_LLADA, PROMPT[0].tolist(), MASK, length, block, steps, loops.llada, scale)
    options: dict[str, Any] = {"steps": steps, "gen_length": length, "block_length": block, "cfg_scale": scale}
    assert llada.generate(LLADA, PROMPT, **options).tolist() == [want]


def test_llada_for_prompts_of_different_lengths() -> None:
    ids, mask, alone = padded([2, 6, 4])
    out = llada.generate(LLADA, ids, mask, steps=8, gen_length=8, block_length=4)
    for row, prompt in zip(out, alone):
        want, _ = loops.in_blocks(OF_LLADA, prompt, MASK, 8, 4, 8, loops.llada)
        assert row[6:].tolist() == want[len(prompt) :]


def test_llada_in_random_order_and_without_an_end() -> None:
    out = llada.generate(LLADA, PROMPT, gen_length=8, block_length=4, steps=8, remasking="random", seed=4)
    ids = torch.nn.functional.pad(PROMPT, (0, 8), value=MASK)
    options: dict[str, Any] = {"block_length": 4, "steps": 8, "temperature": 0.0, "seed": 4}
    assert out.equal(mdkern.sample(LLADA, input_ids=ids, decoder="random", **options).sequences)
    many: dict[str, Any] = {"gen_length": 12, "block_length": 12, "steps": 12, "temperature": 3.0, "seed": 0}
    prompts = PROMPT.expand(40, -1)
    assert (llada.generate(LLADA, prompts, **many) == 3).any()
    assert not (llada.generate(LLADA, prompts, **many, logits_eos_inf=True)[:, 5:] == 3).any()


@pytest.mark.parametrize("bound", [0.2, 0.5, 0.9])
def test_fast_dllm_by_threshold(bound: float) -> None:
    def choose(rows: Any, masked: Any, block: range, quota: int) -> dict[int, int]:
        return rules.threshold(rows, masked, block, bound)

    want = loops.in_blocks(OF_LLADA, PROMPT[0].tolist(), MASK, 12, 6, 12, choose)
    out, passes = fast_dllm.generate(LLADA, PROMPT, gen_length=12, block_length=6, steps=12, threshold=bound)
    assert (out[0].tolist(), passes) == want


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.5, 3.0, 9.0])
def test_fast_dllm_by_factor(factor: float) -> None:
    def choose(rows: Any, masked: Any, block: range, quota: int) -> dict[int, int]:
        return rules.factor_in_code(rows, masked, block, factor)

    want = loops.in_blocks(OF_LLADA, PROMPT[0].tolist(), MASK, 12, 6, 12, choose)
    out, passes = fast_dllm.generate(LLADA, PROMPT, gen_length=12, block_length=6, steps=12, factor=factor)
    assert (out[0].tolist(), passes) == want


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_fast_dllm_with_a_cache_is_sample_with_one(kind: str) -> None:
    function = getattr(fast_dllm, f"generate_with_{kind}_cache")
    out, passes = function(LLADA, PROMPT, 12, 12, 6, threshold=0.3)
    ids = torch.nn.functional.pad(PROMPT, (0, 12), value=MASK)
    options: dict[str, Any] = {"block_length": 6, "temperature": 0.0, "cache": kind}
    want = mdkern.sample(LLADA, input_ids=ids, decoder=decoders.Threshold(0.3), **options)
    assert out.equal(want.sequences)
    assert want.nfe is not None
    assert passes == int(want.nfe["H"].sum())


@pytest.mark.parametrize(
    ("alg", "rule"), [("maskgit_plus", "top_probability"), ("topk_margin", "margin"), ("entropy",) * 2]
)
@pytest.mark.parametrize(("length", "steps", "eps"), [(8, 8, 1e-3), (12, 5, 1e-3), (6, 9, 0.05)])
def test_dream_after_every_step(alg: str, rule: str, length: int, steps: int, eps: float) -> None:
    states = loops.dream(OF_DREAM, PROMPT[0].tolist(), MASK, length, steps, rule, eps)
    options: dict[str, Any] = {"max_new_tokens": length, "steps": steps, "alg": alg, "eps": eps}
    told = dream.diffusion_generate(DREAM, PROMPT, **options, output_history=True, return_dict_in_generate=True)
    assert isinstance(told, dream.DreamModelOutput)
    assert told.sequences is not None
    assert told.history is not None
    assert [state[0].tolist() for state in told.history] == states
    assert told.sequences.tolist() == [states[-1]]


def test_dream_for_prompts_of_different_lengths_several_times() -> None:
    ids, mask, alone = padded([2, 6, 4])
    config = dream.DreamGenerationConfig(max_length=14, steps=8, alg="entropy", num_return_sequences=2)
    out = dream.diffusion_generate(DREAM, ids, config, attention_mask=mask)
    assert isinstance(out, Tensor)
    for number, row in enumerate(out):
        prompt = alone[number // 2]
        want = loops.dream(OF_DREAM, prompt, MASK, 8, 8, "entropy", 1e-3)[-1]
        assert row[6:].tolist() == want[len(prompt) :]


@pytest.mark.parametrize(("steps", "bound"), [(12, 0.1), (6, 0.3), (4, 0.9), (3, 0.0)])
def test_dream_by_threshold(steps: int, bound: float) -> None:
    want = loops.paced_threshold(OF_DREAM, PROMPT[0].tolist(), MASK, 12, steps, bound)
    options: dict[str, Any] = {"alg": "confidence_threshold", "threshold": bound}
    out = dream.diffusion_generate(DREAM, input_ids=PROMPT, max_new_tokens=12, steps=steps, **options)
    assert isinstance(out, Tensor)
    assert out.tolist() == [want]


def test_dreams_random_order_has_dreams_law() -> None:
    """Two masks in two steps, t = 1, 0.5005, 0.001: each is revealed in the first one with probability 1 - 0.5005."""
    prompts = PROMPT.expand(400, -1)
    options: dict[str, Any] = {"output_history": True, "return_dict_in_generate": True, "seed": 1, "temperature": 1.0}
    told = dream.diffusion_generate(DREAM, prompts, max_new_tokens=2, steps=2, **options)
    assert isinstance(told, dream.DreamModelOutput)
    assert told.history is not None
    first, last = told.history
    assert not (last == MASK).any()
    revealed = float((first[:, 5:] != MASK).float().mean())
    assert abs(revealed - 0.4995) < 5 * (0.25 / 800) ** 0.5


def test_dream_in_blocks_with_a_cache_under_the_mixins_name() -> None:
    DREAM.diffusion_generate = fast_dllm.DreamGenerationMixin.diffusion_generate.__get__(DREAM)
    options: dict[str, Any] = {"alg": "confidence_threshold", "threshold": 0.3, "steps": 8}
    out = DREAM.diffusion_generate(PROMPT, max_new_tokens=8, block_length=4, dual_cache=True, **options)
    del DREAM.diffusion_generate
    ids = torch.nn.functional.pad(PROMPT, (0, 8), value=MASK)
    decoder = StartedThreshold(0.3, of="sampler")
    want = mdkern.sample(DREAM, input_ids=ids, block_length=4, cache="dual", temperature=0.0, decoder=decoder)
    assert out.equal(want.sequences)


@pytest.mark.parametrize("bound", [0.1, 0.4, 0.9])
def test_a_block_may_begin_with_its_first_position_alone(bound: float) -> None:
    def choose(rows: Any, masked: Any, block: range, quota: int) -> dict[int, int]:
        if all(masked[i] for i in block):
            return {block[0]: rows[block[0]].token}
        return rules.threshold(rows, masked, block, bound)

    want, passes = loops.in_blocks(OF_DREAM, PROMPT[0].tolist(), MASK, 12, 4, 12, choose)
    ids = torch.nn.functional.pad(PROMPT, (0, 12), value=MASK)
    out = mdkern.sample(DREAM, input_ids=ids, block_length=4, temperature=0.0, decoder=StartedThreshold(bound))
    assert out.sequences is not None
    assert out.nfe is not None
    assert (out.sequences.tolist(), int(out.nfe["H"])) == ([want], passes)


def test_a_started_block_has_dreams_quotas_from_its_second_step_on() -> None:
    """Eight masks in four steps: one, int(7 (1 - s / t)) = 2 of 7, 2 of 5, and the rest, by entropy."""
    counts = iter([(7, 2), (5, 2), (3, 3)] * 2)

    def choose(rows: Any, masked: Any, block: range, quota: int) -> dict[int, int]:
        if all(masked[i] for i in block):
            return {block[0]: rows[block[0]].token}
        left, count = next(counts)
        assert sum(masked[i] for i in block) == left
        return rules.entropy(rows, masked, block, count)

    want, _ = loops.in_blocks(OF_DREAM, PROMPT[0].tolist(), MASK, 16, 8, 8, choose)
    ids = torch.nn.functional.pad(PROMPT, (0, 16), value=MASK)
    decoder = StartedEntropy(quota=decoders.DreamQuota(least=0))
    out = mdkern.sample(DREAM, input_ids=ids, block_length=8, steps=8, temperature=0.0, decoder=decoder)
    assert out.sequences is not None
    assert out.sequences.tolist() == [want]


def test_masks_in_dreams_prompts_are_filled_in() -> None:
    ids = PROMPT.clone()
    ids[0, 2] = MASK
    out = dream.diffusion_generate(DREAM, ids, max_new_tokens=4, steps=4, alg="entropy")
    assert isinstance(out, Tensor)
    assert not (out == MASK).any()
    assert out[0, :2].equal(ids[0, :2])


MASKED = torch.full((1, 3), MASK)
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "length": (llada.generate, {"gen_length": 10, "block_length": 4}, "gen_length must be a multiple of block_len"),
    "steps": (llada.generate, {"gen_length": 8, "block_length": 4, "steps": 3}, "steps must be a multiple of the 2"),
    "remasking": (llada.generate, {"remasking": "entropy"}, "remasking must be one of low_confidence, random"),
    "confidence": (llada.generate, {"confidence_eos_eot_inf": True}, "logits_eos_inf=True forbids"),
    "masked prompt": (llada.generate, {"prompt": MASKED}, "has the mask id 27 in it, which this loop does not fill"),
    "text": (llada.generate, {"prompt": "What?"}, "must be an integer tensor"),
    "too long": (llada.generate, {"gen_length": 128}, "must be at most 24, the positions of LLaDAModelLM"),
    "both": (fast_dllm.generate, {"threshold": 0.9, "factor": 1.0}, "must not both be given"),
    "random threshold": (fast_dllm.generate, {"threshold": 0.9, "remasking": "random"}, "does not go with a threshold"),
    "alg": (dream.diffusion_generate, {"alg": "best"}, "alg must be one of origin, maskgit_plus"),
    "alg_temp": (dream.diffusion_generate, {"alg_temp": 0.1}, "alg_temp goes with alg='maskgit_plus'"),
    "threshold": (dream.diffusion_generate, {"threshold": 0.9}, "threshold goes with alg="),
    "top_p and top_k": (dream.diffusion_generate, {"top_p": 0.9, "top_k": 5}, "must not both be given"),
    "history": (dream.diffusion_generate, {"output_history": True}, "needs return_dict_in_generate=True"),
    "hook": (dream.diffusion_generate, {"generation_tokens_hook_func": print}, "give a streamer that has put_draft"),
    "logits hook": (dream.diffusion_generate, {"generation_logits_hook_func": print}, "Give logits_processor="),
    "end": (dream.diffusion_generate, {"eos_token_id": 3}, "stop_at_eos=True"),
    "dual cache": (dream.diffusion_generate, {"dual_cache": True}, "dual_cache goes with block_length"),
    "max_length": (dream.diffusion_generate, {"max_length": 5}, "max_length must be above the prompt's 5 tokens"),
    "steps of blocks": (
        dream.diffusion_generate,
        {"block_length": 4, "alg": "entropy", "steps": 5, "max_new_tokens": 20},
        "steps must be at least 2 for each block",
    ),
    "blocks at random": (
        dream.diffusion_generate,
        {"block_length": 4},
        "block_length needs alg='confidence_threshold' or",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_have_no_effect_is_refused(case: str) -> None:
    function, options, message = REFUSED[case]
    options = dict(options)
    model = DREAM if function is dream.diffusion_generate else LLADA
    with pytest.raises(ValueError, match=message):
        function(model, options.pop("prompt", PROMPT), **options)


def test_auto_model_loads_the_model_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "it", bert(), make_tokenizer())
    assert type(llada.AutoModel.from_pretrained(path)) is transformers.BertForMaskedLM
    monkeypatch.setattr(transformers.BertForMaskedLM, "diffusion_generate", pytest.fail, raising=False)
    model = dream.AutoModel.from_pretrained(path, torch_dtype=torch.bfloat16).eval()
    assert model.dtype == torch.bfloat16
    options: dict[str, Any] = {"max_new_tokens": 4, "steps": 4, "alg": "entropy"}
    assert model.diffusion_generate(PROMPT, **options).shape == (1, 9)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_on_a_gpu_the_tokens_are_those_of_the_cpu(graphs: bool) -> None:
    """In float32, with and without CUDA graphs: quotas, factors and thresholds are worked out on the device."""
    blocks: dict[str, Any] = {"steps": 12, "gen_length": 12, "block_length": 6}
    text: dict[str, Any] = {"max_new_tokens": 12, "steps": 9}
    calls: list[tuple[Any, Any, dict[str, Any]]] = [
        (make_llada, llada.generate, blocks),
        (make_llada, fast_dllm.generate, blocks | {"threshold": 0.4}),
        (make_llada, fast_dllm.generate_with_dual_cache, blocks | {"factor": 1.5}),
        (make_dream, dream.diffusion_generate, text | {"alg": "entropy"}),
        (make_dream, dream.diffusion_generate, text | {"alg": "confidence_threshold", "threshold": 0.3}),
        (make_dream, dream.diffusion_generate, text | {"alg": "entropy", "block_length": 4, "dual_cache": True}),
    ]
    for make, function, options in calls:
        want = function(make(), PROMPT, **options)
        got = function(make().to("cuda"), PROMPT.to("cuda"), **options, cuda_graphs=graphs)
        for ours, theirs in zip(got if isinstance(got, tuple) else [got], want if isinstance(want, tuple) else [want]):
            assert ours == theirs if isinstance(ours, int) else ours.cpu().equal(theirs), options
