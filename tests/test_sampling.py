"""The sampler against the mathematics: the exact distribution, and the invariances that keyed randomness promises."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mdkern
from mdkern import DiT, DiTConfig
from mdkern.decoders import Ancestral, Threshold
from mdkern.engine.planned import draw_plan, reveal_tick
from mdkern.engine.resolve import resolve
from mdkern.engine.state import SamplerState
from mdkern.plan import RevealPlan, Ticks
from tests.references.enumeration import LENGTH, MASK, ToyDenoiser, chi_square_p, exact_distribution

SAMPLES, EPS = 200_000, 0.05  # an eps large enough for the closing pass to matter: it reveals 5 % of the positions
TOYS = {"H": ToyDenoiser(1), "L": ToyDenoiser(2), "M": ToyDenoiser(3)}
TIMED = {"H": ToyDenoiser(4, time_conditioning=True), "L": ToyDenoiser(5, time_conditioning=True)}
START = (MASK,) * LENGTH


def draw(models: dict[str, ToyDenoiser], schedule: str, seed: int = 0, **options: object) -> Tensor:
    denoisers = {name: model.denoiser() for name, model in models.items()}
    defaults = {"decoder": Ancestral(EPS), "batch_size": 65_536, "seed": seed}
    if "input_ids" not in options:
        defaults |= {"num_samples": SAMPLES, "length": LENGTH}
    return mdkern.sample(denoisers, schedule, **(defaults | options)).sequences


@pytest.mark.filterwarnings("ignore:.*runs by its logits")
class TestExact:
    """Every outcome's probability by enumeration of the Markov chain, chi-square on 200,000 samples."""

    @pytest.mark.parametrize("schedule", ["H4", "L1 H2 L1", "L1 M1 H1 L1"])
    def test_schedules(self, schedule: str) -> None:
        by_step = {"H4": "HHHH", "L1 H2 L1": "LHHL", "L1 M1 H1 L1": "LMHL"}[schedule]
        assert chi_square_p(draw(TOYS, schedule), exact_distribution(TOYS, by_step, START, EPS)) > 1e-3

    def test_the_order_of_the_models_matters_and_is_seen(self) -> None:
        assert chi_square_p(draw(TOYS, "L1 H2 L1"), exact_distribution(TOYS, "HLLH", START, EPS)) < 1e-9

    def test_prompt_with_holes(self) -> None:
        start = (MASK, 2, MASK)
        sequences = draw(TOYS, "L2 H2", input_ids=torch.tensor([start]).expand(SAMPLES, -1))
        assert (sequences[:, 1] == 2).all()
        assert chi_square_p(sequences, exact_distribution(TOYS, "LLHH", start, EPS)) > 1e-3

    def test_time_conditioning(self) -> None:
        sequences = draw(TIMED, "L1 H2 L1")
        assert chi_square_p(sequences, exact_distribution(TIMED, "LHHL", START, EPS)) > 1e-3
        untimed = {name: ToyDenoiser(seed) for name, seed in (("H", 4), ("L", 5))}
        assert chi_square_p(sequences, exact_distribution(untimed, "LHHL", START, EPS)) < 1e-9

    def test_temperature(self) -> None:
        sequences = draw(TOYS, "H4", temperature=0.5)
        assert chi_square_p(sequences, exact_distribution(TOYS, "HHHH", START, EPS, temperature=0.5)) > 1e-3
        assert chi_square_p(sequences, exact_distribution(TOYS, "HHHH", START, EPS)) < 1e-9

    def test_filters(self) -> None:
        """Drawing among the two most probable ids is the sampler of the model whose other ids are impossible."""
        sequences = draw(TOYS, "H4", top_k=2)
        cut = {"H": ToyDenoiser(1)}
        least = cut["H"].table.topk(2).values[..., -1:]
        cut["H"].table = cut["H"].table.masked_fill(cut["H"].table < least, -math.inf)
        assert chi_square_p(sequences, exact_distribution(cut, "HHHH", START, EPS)) > 1e-3
        assert chi_square_p(sequences, exact_distribution(TOYS, "HHHH", START, EPS)) < 1e-9

    def test_samples_of_one_run_are_independent(self) -> None:
        """Neighbouring sample numbers share no randomness: pairs have the product distribution."""
        sequences = draw(TOYS, "H4")
        first, second = (sequences[offset::2] @ (4 ** torch.arange(LENGTH)) for offset in (0, 1))
        joint = torch.zeros(64, 64).index_put((first, second), torch.ones(len(first)), accumulate=True)
        expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True) / joint.sum()
        statistic = float(((joint - expected) ** 2 / expected.clamp(min=1e-9)).sum())
        freedom = 63 * 63
        assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def tiny(blocks: int, seed: int = 0, **settings: object) -> DiT:
    torch.manual_seed(seed)
    config = DiTConfig(**({"vocab_size": 70, "mask_id": 69, "max_length": 48, "num_blocks": blocks, "width": 32,
                           "num_heads": 2, "cond_dim": 16} | settings))  # fmt: skip
    model = DiT(config).eval()
    with torch.no_grad():  # a head that is not flat, so that tokens depend on what is revealed
        model.head_weight.normal_()
    return model


HEAVY, LIGHT = tiny(3), tiny(1, seed=1)
SCHEDULE = "L8 H32 L8"
ONE_BY_ONE = Threshold(1.0)


def run(**options: object) -> mdkern.SampleOutput:
    return mdkern.sample(HEAVY, LIGHT, SCHEDULE, **({"num_samples": 16, "length": 48, "seed": 5} | options))


class TestInvariance:
    @pytest.mark.parametrize("batch_size", [1, 3, 5])
    def test_batch_size(self, batch_size: int) -> None:
        assert torch.equal(run().sequences, run(batch_size=batch_size).sequences)

    def test_idle_slots(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ticks of the sizes that graphs have, whose last slots may work on scratch."""
        expected, plain, idle = run().sequences, RevealPlan.ticks, []

        def of_graph_sizes(*arguments: Any) -> Ticks | None:
            ticks = plain(*arguments)
            assert ticks is not None
            idle.append(sum(ticks.size) - sum(ticks.batch))
            return replace(ticks, batch=ticks.size)

        monkeypatch.setattr(RevealPlan, "ticks", of_graph_sizes)
        assert torch.equal(run().sequences, expected)
        assert any(idle)

    def test_crowded_events_in_ticks_of_their_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        crowded = {"decoder": Ancestral(0.9), "batch_size": 3}
        out = run(**crowded)
        parts = []
        monkeypatch.setattr(RevealPlan, "by_crowding", lambda plan, *_: parts.append(plan) or [plan])
        whole = run(**crowded)
        assert parts
        assert torch.equal(out.sequences, whole.sequences)
        assert all(torch.equal(out.nfe[name], whole.nfe[name]) for name in "HL")

    def test_other_samples_in_the_run(self) -> None:
        assert torch.equal(run().sequences[:5], run(num_samples=5).sequences)

    def test_order_of_samples(self) -> None:
        order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        assert torch.equal(run().sequences[order], run(sample_ids=order).sequences)

    def test_seeds_and_sample_numbers_differ(self) -> None:
        out = run().sequences
        assert (out != run(seed=6).sequences).float().mean() > 0.5
        assert (out != run(sample_ids=range(100, 116)).sequences).float().mean() > 0.5

    def test_seed_from_the_generator(self) -> None:
        first, second = (run(seed=None, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert first.seed == second.seed
        assert torch.equal(first.sequences, second.sequences)
        torch.manual_seed(7)
        state = torch.get_rng_state()
        run(seed=1)
        assert torch.equal(state, torch.get_rng_state()), "a given seed leaves PyTorch's generator alone"

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, side: str) -> None:
        """A sequence in a ragged batch is the sequence alone, whichever side the padding is on."""
        mask_id, lengths = 69, [48, 31, 7]
        prompts = torch.full((3, 48), 0)
        attention_mask = torch.zeros(3, 48, dtype=torch.long)
        for row, length in enumerate(lengths):
            where = slice(48 - length, 48) if side == "left" else slice(0, length)
            prompts[row, where], attention_mask[row, where] = mask_id, 1
            prompts[row, where.start] = 3
        ragged = mdkern.sample(HEAVY, LIGHT, SCHEDULE, input_ids=prompts, attention_mask=attention_mask, seed=5)
        for row, length in enumerate(lengths):
            alone = torch.full((1, length), mask_id)
            alone[0, 0] = 3
            out = mdkern.sample(HEAVY, LIGHT, SCHEDULE, input_ids=alone, sample_ids=[row], seed=5)
            assert torch.equal(ragged.sequences[row][attention_mask[row].bool()], out.sequences[0])
        assert (ragged.sequences[attention_mask == 0] == 0).all(), "padding is not written"


class TestResult:
    def test_nothing_masked_or_padded_is_left(self) -> None:
        sequences = run(num_samples=64).sequences
        assert sequences.dtype == torch.int64
        assert sequences.shape == (64, 48)
        assert ((sequences >= 0) & (sequences < 69)).all()

    def test_input_is_left_alone(self) -> None:
        prompt = torch.full((2, 20), 69)
        prompt[:, :4] = torch.arange(8).view(2, 4)
        given = prompt.clone()
        out = mdkern.sample(HEAVY, input_ids=prompt, seed=0)
        assert torch.equal(prompt, given)
        assert torch.equal(out.sequences[:, :4], given[:, :4])

    @pytest.mark.slow
    def test_nfe_is_the_number_of_steps_that_reveal(self) -> None:
        """Per sequence and denoiser, and within 1 % of ``T (1 - (1 - 1/T)^L)`` in the mean."""
        out = run(num_samples=500, batch_size=256, return_history=True)
        history = out.history
        assert history is not None
        for row in range(50):
            for index, name in enumerate(history.models):
                steps = set(history.step[row][history.model[row] == index].tolist())
                assert len(steps) == out.nfe[name][row]
        passes = sum(out.nfe.values())
        steps = length = 48
        assert abs(float(passes.double().mean()) / (steps * (1 - (1 - 1 / steps) ** length)) - 1) < 0.01
        assert torch.allclose(out.tokens_per_forward, length / passes)

    def test_history_tells_step_and_model(self) -> None:
        prompt = torch.full((4, 48), 69)
        prompt[:, :9] = 1
        history = mdkern.sample(HEAVY, LIGHT, SCHEDULE, input_ids=prompt, seed=0, return_history=True).history
        assert (history.step[:, :9] == -1).all()
        assert (history.model[:, :9] == -1).all()
        light = (history.step[:, 9:] < 8) | (history.step[:, 9:] >= 40)
        assert torch.equal(light, history.model[:, 9:] == history.models.index("L"))

    @pytest.mark.parametrize("options", [{}, {"decoder": ONE_BY_ONE}, {"decoder": "entropy", "block_length": 13}])
    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_log_probabilities_are_those_of_the_drafts(self, options: dict[str, Any], temperature: float) -> None:
        """Each token's, by its model's distribution for the text as it was before its step, one pass at a time."""
        prompt = torch.full((3, 48), 69)
        prompt[:, :9] = 1
        out = mdkern.sample(
            HEAVY, LIGHT, SCHEDULE, input_ids=prompt, seed=0, temperature=temperature, return_history=True, **options
        )
        history = out.history
        assert history.log_prob[:, :9].isnan().all()
        for row in range(3):
            for step in set(history.step[row, 9:].tolist()):
                now, draft = history.step[row] == step, history.draft(out.sequences, step, 69)[row, None]
                assert torch.equal(draft[0] == 69, history.step[row] >= step)
                (model,) = set(history.model[row, now].tolist())
                network = {"H": HEAVY, "L": LIGHT}[history.models[model]]
                logits = network.logits(network.plain_hidden(draft))[0, now]
                exact = logits.log_softmax(-1).gather(1, out.sequences[row, now, None])[:, 0]
                assert torch.allclose(history.log_prob[row, now], exact, atol=1e-5)

    def test_flops_saved_is_what_the_passes_cost(self) -> None:
        out = run()
        rows = round(float(out.tokens_per_forward.mean()))
        cost = {name: model.flops(48, rows) for name, model in (("H", HEAVY), ("L", LIGHT))}
        passes = {name: int(count.sum()) for name, count in out.nfe.items()}
        spent = sum(passes[name] * cost[name] for name in passes)
        assert out.flops_saved == pytest.approx(1 - spent / (cost["H"] * sum(passes.values())))

    def test_greedy_is_the_argmax_at_the_reveal(self) -> None:
        """At temperature 0 with one position left, the token is the model's argmax."""
        prompt = torch.randint(0, 69, (8, 12), generator=torch.Generator().manual_seed(0))
        prompt[:, 5] = 69
        out = mdkern.sample(HEAVY, input_ids=prompt, temperature=0, seed=0)
        assert torch.equal(out.sequences[:, 5], HEAVY(prompt)[:, 5].argmax(-1))

    def test_one_step_and_one_position(self) -> None:
        assert mdkern.sample(HEAVY, num_samples=3, length=1, steps=1, seed=0).sequences.shape == (3, 1)

    def test_steps_default_to_the_schedule_and_then_to_the_length(self) -> None:
        assert run(return_history=True).history.steps == 48
        assert mdkern.sample(HEAVY, length=10, seed=0, return_history=True).history.steps == 10


OPEN = dict.fromkeys(
    (
        "input_ids",
        "attention_mask",
        "num_samples",
        "length",
        "steps",
        "steps_per_block",
        "batch_size",
        "seed",
        "generator",
        "sample_ids",
    )
) | {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "decoder": "ancestral",
    "block_length": None,
    "cache": "none",
    "stop_at_eos": False,
    "guidance_scale": 0.0,
    "logits_processor": None,
    "stopping_criteria": None,
    "streamer": None,
}  # every argument of `resolve` left open


class TestBfloat16:
    def test_same_noise_nearly_the_same_tokens(self) -> None:
        """bf16 changes logits by their rounding only: the draws are the same, so most first tokens are."""
        half = [tiny(3).bfloat16(), tiny(1, seed=1).bfloat16()]
        out = mdkern.sample(*half, SCHEDULE, num_samples=16, length=48, seed=5, return_history=True)
        full = run(return_history=True)
        assert torch.equal(out.history.step, full.history.step)
        first = full.history.step == full.history.step.amin(-1, keepdim=True)
        assert (out.sequences == full.sequences)[first].float().mean() > 0.9


@pytest.mark.gpu
class TestGpu:
    def test_batch_size_with_the_shipped_pair_in_bfloat16(self) -> None:
        heavy, light, _ = mdkern.load_pair("cuda")
        runs = [
            mdkern.sample(heavy, light, "L32 H192 L32", num_samples=12, seed=0, batch_size=size, return_history=True)
            for size in (1, 3, 16)
        ]
        for other in runs[1:]:
            assert torch.equal(runs[0].history.step, other.history.step)
            assert (runs[0].sequences == other.sequences).float().mean() >= 0.99

    def test_gpu_draws_what_the_cpu_draws(self) -> None:
        out = [
            mdkern.sample(HEAVY.to(d), LIGHT.to(d), SCHEDULE, num_samples=16, length=48, seed=5)
            for d in ("cuda", "cpu")
        ]
        assert (out[0].sequences.cpu() == out[1].sequences).float().mean() >= 0.99

    def test_no_host_synchronisation_in_a_tick(self) -> None:
        heavy = mdkern.adapt(HEAVY.to("cuda"))
        try:
            request = resolve(heavy, None, None, **(OPEN | {"num_samples": 8, "length": 48, "seed": 0}))
            state = SamplerState.of(request)
            ticks = draw_plan(request, state).ticks(0, request.most_steps + 1, 4)
            assert ticks is not None
            step = partial(reveal_tick, heavy, heavy.head, request, state, ticks)
            with torch.no_grad():
                step(ticks.batch[0], ticks.rows[0])  # compiles the kernels
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                for batch, rows in zip(ticks.batch[1:], ticks.rows[1:]):
                    step(batch, rows)
            torch.cuda.set_sync_debug_mode("default")
            assert not (state.input_ids[:-1] == request.mask_id).any()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            HEAVY.to("cpu")
