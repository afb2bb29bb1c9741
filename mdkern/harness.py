"""mdkern as a model of EleutherAI's lm-evaluation-harness, under the name ``mdkern``.

    python -m mdkern.harness run --model mdkern --tasks gsm8k --model_args pretrained=PATH,decoder=threshold

is the harness's own command line with this model known to it. From Python, give an `MdkernLM` to
``lm_eval.simple_evaluate(model=...)``. It needs ``pip install mdkern[harness]``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import mdkern
from mdkern.cli.common import choose_device
from mdkern.cli.decoder import parse_decoder
from mdkern.models import Denoiser, adapt

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ImportError("mdkern.harness needs lm-evaluation-harness: pip install 'mdkern[harness]'") from error

# Texts are run together with those of the same width, rounded up to a multiple of this: answers in captured passes, of
# which there is one for each width, likelihoods in passes that are launched one by one.
ANSWER_WIDTHS, LIKELIHOOD_WIDTHS = 64, 8
LENGTHS = "max_gen_toks", "max_new_tokens"  # names that tasks use for the length of an answer
UNUSED = "do_sample", "until", "stop", "use_cache", "repeats"  # read here, or without a meaning for us


@register_model("mdkern")
class MdkernLM(TemplateLM):
    """A masked diffusion language model, or a heavy and a light one under a schedule.

    ``loglikelihood`` is the any-order bound of `mdkern.likelihood` on the continuation's likelihood given its context
    (LLaDA, 2502.09992, eq. 6), with the standard number of masks. ``generate_until`` fills ``gen_length`` masks after
    the context, for all requests of a task together. Neither depends on the batch size.
    """

    def __init__(
        self,
        pretrained: Any,
        light: Any = None,
        schedule: str | None = None,
        tokenizer: Any = None,
        *,
        gen_length: int = 256,
        decoder: str = "threshold",
        block_length: int | None = 32,
        steps: int | None = None,
        steps_per_block: int | None = None,
        cache: str = "none",
        temperature: float = 0.0,
        guidance_scale: float = 0.0,
        stop_at_eos: bool = True,
        samples: int = 128,
        check_greedy: bool = True,
        add_bos_token: bool = False,
        max_length: int | None = None,
        batch_size: int | str = 8,
        seed: int = 0,
        device: str | None = None,
        dtype: str = "auto",
        precision: str | None = None,
        head_precision: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        """
        Args:
            pretrained, light: models that `mdkern.sample` takes, or names or folders for `mdkern.from_pretrained`.
            schedule: which of the two runs at which step.
            tokenizer: of transformers, or its folder. Default: the checkpoint's.
            gen_length: tokens of an answer, where the task does not say.
            decoder: as ``--decoder`` of ``mdkern sample``, such as ``"threshold"`` or ``"factor:factor=1.2"``.
            block_length, steps, steps_per_block, cache, temperature, guidance_scale, stop_at_eos, seed: as for
                `mdkern.sample`. A task's own temperature, top_p and top_k come first.
            samples: masks for each likelihood.
            check_greedy: also find out whether the continuation is what greedy decoding, one token at a time, gives.
                Without it, ``is_greedy`` is False.
            add_bos_token: put the tokenizer's beginning of text before every context.
            max_length: the longest text in tokens; longer contexts lose their beginning. Default: the model's.
            batch_size: texts in a forward pass. It changes no result.
            precision, head_precision: as for `mdkern.adapt`.
            device, dtype, revision, trust_remote_code: of models to be loaded.
            max_batch_size: accepted because the harness passes it; ``batch_size="auto"`` is not supported.
        """
        super().__init__()
        try:
            self.batch_size = int(batch_size)
        except ValueError:
            raise ValueError(f"batch_size must be a number, not {batch_size!r}") from None
        files = {"dtype": dtype, "revision": revision, "trust_remote_code": bool(trust_remote_code)}
        if not any(isinstance(model, str | os.PathLike) for model in (pretrained, light)):
            for name, default in (("dtype", "auto"), ("revision", None), ("trust_remote_code", False)):
                if files[name] != default:
                    raise ValueError(f"{name} is for models that are loaded, and these are loaded already")
        loading = files | {"precision": precision, "head_precision": head_precision}
        self._device = choose_device(device)
        heavy = self.load(pretrained, tokenizer, loading)
        self.models: dict[str, Denoiser] = {"H": heavy}
        if light is not None:
            self.models["L"] = self.load(light, tokenizer, loading)
        self.schedule = schedule
        found = getattr(heavy, "tokenizer", None) if tokenizer is None or isinstance(tokenizer, str) else tokenizer
        if found is None:
            raise ValueError(f"{heavy.name} has no tokenizer: give tokenizer=, its folder or name")
        self.tokenizer: Any = found
        self._device = heavy.device
        self.max_length = int(max_length or heavy.max_length or 4096)
        self.gen_length, self.samples, self.seed = int(gen_length), int(samples), int(seed)
        self.check_greedy, self.add_bos_token = bool(check_greedy), bool(add_bos_token)
        self.decoding: dict[str, Any] = {
            "decoder": parse_decoder(decoder)(found, heavy.vocab_size),
            "block_length": block_length,
            "steps": steps,
            "steps_per_block": steps_per_block,
            "cache": cache,
            "temperature": float(temperature),
            "guidance_scale": float(guidance_scale),
            "stop_at_eos": bool(stop_at_eos) and bool(heavy.eos_ids),
        }
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if not dist.is_initialized():
                dist.init_process_group("gloo")
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def load(self, model: Any, tokenizer: Any, options: dict[str, Any]) -> Denoiser:
        if not isinstance(model, str | os.PathLike):
            return adapt(model, precision=options["precision"], head_precision=options["head_precision"])
        return mdkern.from_pretrained(model, tokenizer=tokenizer, device_map=self._device, **options)

    @property
    def eot_token_id(self) -> int:
        return self.models["H"].eos_ids[0] if self.models["H"].eos_ids else self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        if self.add_bos_token and add_special_tokens is not False and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # of an empty continuation
        texts, contexts, numbers = [], [], []
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation:
                continue
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, but the model takes texts of {self.max_length}"
                )
            context = context[max(0, len(context) + len(continuation) - self.max_length) :]
            texts.append([*context, *continuation])
            contexts.append(len(context))
            numbers.append(number)
        greedy = self.are_greedy(texts, contexts) if self.check_greedy else [False] * len(texts)
        bar = tqdm(total=len(texts), desc="likelihoods", disable=bool(options.get("disable_tqdm")))
        for rows, ids, mask in self.batches(texts, LIKELIHOOD_WIDTHS):
            sample_ids = [self.sample_id(numbers[row]) for row in rows]
            nats = self.bound(ids, after_contexts(mask, [contexts[row] for row in rows]), sample_ids, self.call(mask))
            for row, value in zip(rows, nats.tolist()):
                results[numbers[row]] = (-value, greedy[row])
                self.cache_hook.add_partial("loglikelihood", requests[numbers[row]][0], results[numbers[row]])
            bar.update(len(rows))
        bar.close()
        return results

    def call(self, mask: Tensor) -> dict[str, Any]:
        """Arguments for texts with padding where `mask` is False."""
        return {"attention_mask": None if bool(mask.all()) else mask, "batch_size": self.batch_size}

    def sample_id(self, number: int) -> int:
        """Keys the randomness of a request. The harness deals documents out to processes in turn."""
        return number * self.world_size + self.rank

    def bound(self, ids: Tensor, wanted: Tensor, numbers: Sequence[int], call: dict[str, Any]) -> Tensor:
        """The bound on -log p of the wanted tokens, in nats, float64 ``[N]``."""
        options: dict[str, Any] = {"samples": self.samples, "seed": self.seed, "sample_ids": numbers, "progress": False}
        return mdkern.likelihood(self.models, self.schedule, input_ids=ids, wanted=wanted, **options, **call).nats

    def are_greedy(self, texts: Sequence[Sequence[int]], contexts: Sequence[int]) -> list[bool]:
        """Whether decoding at temperature 0, surest position first, gives what follows the contexts."""
        found = [False] * len(texts)
        options: dict[str, Any] = {
            "decoder": "top_probability",
            "temperature": 0.0,
            "seed": self.seed,
            "progress": False,
        }
        for rows, ids, mask in self.batches(texts, ANSWER_WIDTHS):
            wanted = after_contexts(mask, [contexts[row] for row in rows])
            masked = torch.where(wanted, self.models["H"].mask_id, ids)
            written = mdkern.sample(
                self.models, self.schedule, input_ids=masked, **options, **self.call(mask)
            ).sequences
            assert written is not None
            for row, same in zip(rows, (written == ids).all(-1).tolist()):
                found[row] = same
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The bound on each whole text, in windows of the model's length of which each token is wanted once."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, 1):
                context, continuation = make_disjoint_window(pair)
                windows.append((("", ""), list(context), list(continuation)))
                owner.append(number)
        greedy, self.check_greedy = self.check_greedy, False
        try:
            parts = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        finally:
            self.check_greedy = greedy
        results = [0.0] * len(requests)
        for number, (value, _) in zip(owner, parts):
            results[number] += value
        for request, value in zip(requests, results):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        kinds: dict[str, list[int]] = {}  # requests with the same options run together
        for number, request in enumerate(requests):
            kinds.setdefault(repr(sorted(generation_options(request.args[1], self.gen_length).items())), []).append(
                number
            )
        bar = tqdm(total=len(requests), desc="answers", disable=disable_tqdm)
        mask_id = self.models["H"].mask_id
        for numbers in kinds.values():
            own = {"temperature": self.decoding["temperature"]}
            asked = generation_options(own | requests[numbers[0]].args[1], self.gen_length)
            length = asked.pop("length")
            if length >= self.max_length:
                raise ValueError(f"an answer of {length} tokens leaves no room for a prompt: the model takes texts of "
                                 f"{self.max_length}. Set gen_length or the task's max_gen_toks")  # fmt: skip
            prompts = [self.tok_encode(requests[number].args[0])[length - self.max_length :] for number in numbers]
            for rows, ids, mask in self.batches([[*prompt, *[mask_id] * length] for prompt in prompts], ANSWER_WIDTHS):
                call = self.decoding | asked | self.call(mask) | {"seed": self.seed, "progress": False}
                call["sample_ids"] = names = [self.sample_id(numbers[row]) for row in rows]
                for output in mdkern.sample_groups(self.models, self.schedule, input_ids=ids, **call):
                    assert output.sample_ids is not None
                    texts = output.decode(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
                    for name, text in zip(output.sample_ids.tolist(), texts):
                        number = numbers[rows[names.index(name)]]
                        request = requests[number]
                        answers[number] = before_stops(text, stops_of(request.args[1]))
                        self.cache_hook.add_partial("generate_until", request.args, answers[number])
                    bar.update(len(texts))
        bar.close()
        return answers

    def batches(self, texts: Sequence[Sequence[int]], widths: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Texts of about the same length, padded on the right: their numbers, ids, and where they are no padding.

        Widths are multiples of `widths`. Models that take no padding are given texts of exactly the same length.
        """
        pads = all(model.takes_attention_mask for model in self.models.values())
        by_width: dict[int, list[int]] = {}
        for number, text in enumerate(texts):
            width = -(-len(text) // widths) * widths if pads else len(text)
            by_width.setdefault(min(width, self.max_length), []).append(number)
        pad = next(item for item in (0, 1) if item != self.models["H"].mask_id)
        for width, numbers in sorted(by_width.items()):
            width = max(len(texts[number]) for number in numbers) if len(numbers) == 1 else width
            ids = torch.full((len(numbers), width), pad)
            mask = torch.zeros_like(ids, dtype=torch.bool)
            for row, number in enumerate(numbers):
                ids[row, : len(texts[number])] = torch.tensor(texts[number])
                mask[row, : len(texts[number])] = True
            yield numbers, ids.to(self._device), mask.to(self._device)

    def all_gather(self, tensor: Tensor) -> Tensor:
        if self.world_size == 1:
            return tensor
        parts = [torch.zeros_like(tensor.cpu()) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.cpu())
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        if self.world_size == 1:
            return [obj]
        parts: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, parts, dst=dst)
        return parts

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def after_contexts(mask: Tensor, contexts: Sequence[int]) -> Tensor:
    """Where texts go on after so many tokens, bool ``[N, L]``; ``mask [N, L]`` is False at padding on the right."""
    column = torch.arange(mask.shape[1], device=mask.device)
    return (column >= torch.tensor(contexts, device=mask.device)[:, None]) & mask


def generation_options(given: dict[str, Any], default: int) -> dict[str, Any]:
    """A request's options as arguments of `mdkern.sample`, with the answer's ``length``.

    Raises:
        ValueError: an option that has no meaning for masked diffusion.
    """
    options = {name: value for name, value in given.items() if name not in UNUSED}
    if options.get("num_beams") == 1:  # no beam search, which some tasks say
        del options["num_beams"]
    lengths = [options.pop(name) for name in LENGTHS if name in options]
    chosen: dict[str, Any] = {"length": int(lengths[0]) if lengths else default}
    for name in ("temperature", "top_p", "top_k", "min_p"):
        if options.get(name) is not None:
            chosen[name] = options.pop(name)
    if given.get("do_sample") is False:
        chosen["temperature"] = 0.0
    if chosen.get("temperature") == 0:  # greedy, whatever else a task's file says about drawing
        chosen = {name: value for name, value in chosen.items() if name not in ("top_p", "top_k", "min_p")}
    if options:
        raise ValueError(f"the task asks for {', '.join(options)}, which mdkern does not know")
    return chosen


def stops_of(given: dict[str, Any]) -> list[str]:
    """The texts at which an answer ends."""
    until = given.get("until") or given.get("stop") or []
    return [until] if isinstance(until, str) else list(until)


def before_stops(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops."""
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    import mdkern.harness  # registers under the package's name, not under __main__

    cli_evaluate()
