"""mdkern inside lm-evaluation-harness, which `make test-harness` installs: requests against single calls of mdkern."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import mdkern
from mdkern import DiT, DiTConfig, pretrained
from tests.conftest import random_dit

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402

from mdkern.harness import MdkernLM, before_stops, generation_options  # noqa: E402

SHAPE = {"vocab_size": 4096, "mask_id": 4095, "max_length": 160, "width": 32, "num_heads": 2}
CONTEXTS = ["The old man", "It was late in the evening when they came to", "She"]
ENDS = [" went home.", " the house", " said nothing at all, and left"]


def model(**options: Any) -> MdkernLM:
    heavy = random_dit(3, num_blocks=2, **SHAPE)
    tokenizer = pretrained.load_pair()[2]
    return MdkernLM(heavy, tokenizer=tokenizer, **({"gen_length": 32, "samples": 8, "decoder": "threshold"} | options))


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, item, number) for number, item in enumerate(arguments)]


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"revision": "main"}, {"trust_remote_code": True}])
def test_what_is_for_loading_is_refused_for_a_model(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is for models that are loaded"):
        model(**options)


class TestLikelihood:
    @pytest.mark.parametrize("batch_size", [1, 8])
    def test_is_the_bound_of_each_continuation_alone(self, batch_size: int) -> None:
        harness = model(batch_size=batch_size, check_greedy=False)
        found = harness.loglikelihood(requests("loglikelihood", list(zip(CONTEXTS, ENDS))))
        for number, (context, end) in enumerate(zip(CONTEXTS, ENDS)):
            before, ids = (harness.tok_encode(text) for text in (context, context + end))
            wanted = torch.arange(len(ids)) >= len(before)
            alone = mdkern.likelihood(
                harness.models, input_ids=torch.tensor([ids]), wanted=wanted[None], samples=8, sample_ids=[number]
            )
            assert math.isclose(found[number][0], -float(alone.nats), rel_tol=1e-5)
            assert found[number][1] is False

    def test_greedy_continuations_are_told(self) -> None:
        harness = model()
        (answer,) = harness.generate_until(requests("generate_until", [("The old man", {"max_gen_toks": 1})]))
        other = next(text for text in (" and", " of") if text != answer)
        pairs = [("The old man", answer), ("The old man", other)]
        asked = [((*pair,), harness.tok_encode(pair[0]), harness.tok_encode(pair[1])) for pair in pairs]
        assert [greedy for _, greedy in harness._loglikelihood_tokens(asked)] == [True, False]

    def test_a_long_context_loses_its_beginning(self) -> None:
        harness = model(max_length=16, check_greedy=False)
        context, end = list(range(40)), [50, 51]
        ((value, _),) = harness._loglikelihood_tokens([(("", ""), context, end)])
        ids = torch.tensor([context[-14:] + end])
        alone = mdkern.likelihood(harness.models, input_ids=ids, wanted=torch.arange(16)[None] >= 14, samples=8)
        assert math.isclose(value, -float(alone.nats), rel_tol=1e-5)

    def test_rolling_wants_every_token_once(self) -> None:
        harness = model(max_length=16)
        text = " ".join(CONTEXTS + ENDS)
        asked: list[Any] = []
        harness._loglikelihood_tokens = lambda parts, **_: asked.extend(parts) or [(-1.0, False)] * len(parts)  # type: ignore[method-assign]
        assert harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)])) == [-1.0 * len(asked)]
        assert [token for _, _, continuation in asked for token in continuation] == harness.tok_encode(text)
        assert all(len(context) + len(continuation) <= 16 for _, context, continuation in asked)


class TestAnswers:
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_are_those_of_single_calls(self, temperature: float) -> None:
        harness = model(temperature=temperature, batch_size=2)
        answers = harness.generate_until(requests("generate_until", [(text, {"until": []}) for text in CONTEXTS]))
        for number, (context, answer) in enumerate(zip(CONTEXTS, answers)):
            ids = torch.tensor([harness.tok_encode(context) + [4095] * 32])
            alone = mdkern.sample(
                harness.models["H"],
                input_ids=ids,
                decoder="threshold",
                block_length=32,
                temperature=temperature,
                seed=0,
                sample_ids=[number],
            )
            assert alone.decode(harness.tokenizer, skip_prompt=True, skip_special_tokens=True) == [answer]

    def test_end_before_the_first_stop(self) -> None:
        assert before_stops("one\n\ntwo Q: three", ["Q:", "\n\n"]) == "one"
        assert before_stops("one", ["Q:", ""]) == "one"

    def test_options_of_tasks(self) -> None:
        assert generation_options({"until": ["."], "do_sample": False, "temperature": 0.0}, 64) == {
            "length": 64, "temperature": 0.0,
        }  # fmt: skip
        assert generation_options({"max_gen_toks": 8, "do_sample": True, "temperature": 0.7, "top_p": 0.9}, 64) == {
            "length": 8, "temperature": 0.7, "top_p": 0.9,
        }  # fmt: skip
        assert generation_options({"num_beams": 1}, 64) == {"length": 64}
        greedy = {"do_sample": False, "temperature": 0.7, "top_p": 0.9}
        assert generation_options(greedy, 64) == {"length": 64, "temperature": 0.0}
        for unknown in ({"repetition_penalty": 1.2}, {"num_beams": 4}):
            with pytest.raises(ValueError, match=f"{next(iter(unknown))}, which mdkern does not know"):
                generation_options(unknown, 64)


def test_a_task_that_names_top_p_alone_gets_greedy_answers() -> None:
    harness, asked = model(), [{"max_gen_toks": 4}, {"max_gen_toks": 4, "top_p": 0.9}]
    plain, named = (harness.generate_until(requests("generate_until", [("one", options)])) for options in asked)
    assert plain == named


def test_the_precision_of_the_output_layer_reaches_the_models() -> None:
    assert model(head_precision="fp8").models["H"].head_precision == "fp8"
    assert model().models["H"].head_precision is None


def test_a_local_task_file(tmp_path: Path) -> None:
    """A task of each kind, by the harness's own evaluation from a checkpoint's folder."""
    config = DiTConfig(num_blocks=1, **SHAPE)
    DiT(config).save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    lines = [{"question": text, "choices": ENDS, "answer": 0, "text": ENDS[0]} for text in CONTEXTS]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    common = source | {"doc_to_text": "{{question}}"}
    choice = {"task": "choices", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    written = {"task": "written", "output_type": "generate_until", "doc_to_target": "{{text}}"}
    kwargs = {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 32}, "metric_list": [{"metric": "exact_match"}]}
    tasks = [common | choice | {"doc_to_target": "answer"}, common | written | kwargs]
    results = lm_eval.simple_evaluate(
        model="mdkern",
        model_args={
            "pretrained": str(tmp_path / "model"),
            "tokenizer": str(pretrained.FOLDER / "tokenizer"),
            "samples": 4,
        },
        tasks=tasks,
        bootstrap_iters=0,
    )
    assert results["n-samples"]["choices"]["effective"] == results["n-samples"]["written"]["effective"] == 3
    accuracy = results["results"]["choices"]["acc,none"]
    assert 0.0 <= accuracy <= 1.0
    answers = [sample["resps"][0][0] for sample in results["samples"]["written"]]
    assert all("\n" not in answer for answer in answers)
