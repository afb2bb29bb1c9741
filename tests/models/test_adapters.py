"""`adapt`: our DiT, Hugging Face masked language models and callables as denoisers, each sampled from end to end.

How models are split, and what they then can do, is in `test_split`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

import mdkern
from mdkern import Denoiser, DiT, adapt

MakeDiT = Callable[..., DiT]
VOCAB, MASK = 11, 10  # `make_dit`'s
WORDS = 30
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SHAPE = SIZE | {"vocab_size": WORDS}

pytestmark = pytest.mark.filterwarnings("ignore:.*runs by its logits")


def bert(**changes: Any) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**(SHAPE | {"max_position_embeddings": 12, "initializer_range": 0.5} | changes)))


def roberta() -> RobertaForMaskedLM:
    torch.manual_seed(0)
    config = RobertaConfig(**SHAPE, max_position_embeddings=12, initializer_range=0.5, pad_token_id=1)
    return RobertaForMaskedLM(config)


def logits_of(model: DiT) -> Callable[[Tensor], Tensor]:
    """A DiT as somebody else's function: every logit of every position, the mask's included and finite."""

    def model_logits(input_ids: Tensor) -> Tensor:
        return model.hidden(input_ids) @ model.head_weight[:VOCAB].T + model.head_bias[:VOCAB]

    return model_logits


class TestEndsOfText:
    def test_one_or_several(self, make_dit: MakeDiT) -> None:
        sizes = {"vocab_size": VOCAB, "mask_id": MASK}
        logits = logits_of(make_dit())
        for given, expected in ((3, (3,)), ([5, 3, 5], (5, 3)), (torch.tensor([1, 2]), (1, 2)), (None, ())):
            assert adapt(logits, eos_id=given, **sizes).eos_ids == expected
        assert adapt(make_dit(eos_id=[3, 5])).eos_ids == (3, 5)

    @pytest.mark.parametrize("wrong", [-1, VOCAB, MASK, [3, MASK], [[3]], "3", 3.0, True])
    def test_what_cannot_end_a_text_is_refused(self, wrong: object, make_dit: MakeDiT) -> None:
        with pytest.raises(ValueError, match=f"eos_id must be an id in 0..{VOCAB - 1} other than the mask id {MASK}"):
            adapt(logits_of(make_dit()), vocab_size=VOCAB, mask_id=MASK, eos_id=wrong)


class TestOurDiT:
    def test_sampled_through_the_split(self, make_dit: MakeDiT, monkeypatch: pytest.MonkeyPatch) -> None:
        model = make_dit(eos_id=3)
        denoiser = adapt(model, name="mine")
        assert (denoiser.vocab_size, denoiser.mask_id, denoiser.eos_ids) == (VOCAB, MASK, (3,))
        assert (denoiser.max_length, denoiser.num_blocks, denoiser.time_conditioning) == (16, 2, False)
        assert (denoiser.name, denoiser.device.type, denoiser.dtype) == ("mine", "cpu", torch.float32)
        monkeypatch.setattr(Denoiser, "logits", None)
        monkeypatch.setattr(DiT, "logits", None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = mdkern.sample(model, num_samples=3, length=9, steps=9, seed=0)
        assert out.sequences.shape == (3, 9)
        assert ((out.sequences >= 0) & (out.sequences < MASK)).all()

    def test_hidden_and_head_make_the_logits(self, make_dit: MakeDiT) -> None:
        model = make_dit(time_conditioning=True)
        denoiser = adapt(model)
        ids, t = torch.arange(8).view(2, 4), torch.tensor([0.3, 0.8])
        torch.testing.assert_close(denoiser.logits(ids, t), model(ids, t))
        assert denoiser.flops(4, 2) == model.flops(4, 2)

    def test_a_denoiser_is_returned_as_it_is(self, make_dit: MakeDiT) -> None:
        denoiser = adapt(make_dit())
        assert adapt(denoiser) is denoiser
        assert adapt(denoiser, mask_id=MASK, vocab_size=VOCAB) is denoiser

    @pytest.mark.parametrize("as_denoiser", [False, True])
    def test_what_the_model_knows_cannot_be_contradicted(self, make_dit: MakeDiT, as_denoiser: bool) -> None:
        model = adapt(make_dit()) if as_denoiser else make_dit()
        with pytest.raises(ValueError, match="mask_id=3 contradicts the model's own 10"):
            adapt(model, mask_id=3)
        with pytest.raises(ValueError, match="vocab_size=12 contradicts the model's own 11"):
            adapt(model, vocab_size=12)
        with pytest.raises(ValueError, match="block_causal=4 contradicts the model, which has none"):
            adapt(model, block_causal=4)


class TestHuggingFace:
    @pytest.mark.parametrize("make", [bert, roberta])
    def test_sampled_end_to_end(self, make: Callable[[], nn.Module]) -> None:
        denoiser = adapt(make().eval(), mask_id=4)
        assert (denoiser.vocab_size, denoiser.num_blocks, denoiser.time_conditioning) == (WORDS, 2, False)
        out = mdkern.sample(denoiser, num_samples=40, length=8, steps=4, seed=0, return_history=True)
        assert ((out.sequences >= 0) & (out.sequences < WORDS) & (out.sequences != 4)).all()
        assert out.sequences.unique().numel() > 10
        assert out.flops_saved is None  # unknown, and said to be

    def test_logits_are_the_models_own(self) -> None:
        model = bert().eval()
        ids = torch.randint(WORDS, (3, 8), generator=torch.Generator().manual_seed(0))
        denoiser, want = adapt(model, mask_id=4), model(ids).logits
        got = denoiser.logits(ids)
        assert (got[..., 4] == -torch.inf).all()
        kept = torch.arange(WORDS) != 4
        torch.testing.assert_close(got[..., kept], want[..., kept])
        positions = torch.tensor([[7, 0], [1, 1], [3, 2]])
        rows = denoiser.head.logits(denoiser.hidden(ids, None, positions))[..., kept]
        torch.testing.assert_close(rows, torch.stack([row[place] for row, place in zip(want, positions)])[..., kept])

    @pytest.mark.parametrize("make", [bert, roberta])
    def test_padding_on_the_right_does_not_reach_the_text(self, make: Callable[[], nn.Module]) -> None:
        denoiser = adapt(make().eval(), mask_id=4)
        alone = torch.tensor([[7, 4, 9, 4, 4]])
        padded = torch.cat((alone, torch.tensor([[1, 1, 1]])), dim=1)
        mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
        want = mdkern.sample(denoiser, input_ids=alone, steps=6, seed=3).sequences
        got = mdkern.sample(denoiser, input_ids=padded, attention_mask=mask, steps=6, seed=3).sequences
        assert got[:, :5].equal(want)
        assert got[:, 5:].equal(padded[:, 5:])

    def test_training_mode_is_refused(self) -> None:
        model = bert().train()
        with pytest.raises(ValueError, match=r"training mode.*call model\.eval\(\) first"):
            adapt(model, mask_id=4)

    def test_training_mode_later_is_refused_too(self, make_dit: MakeDiT) -> None:
        """As of a training loop that keeps a denoiser, of one layer alone, or of an adapter in a DiT."""
        by_logits = nn.Sequential(nn.Embedding(VOCAB, 8), nn.Dropout(0.5), nn.Linear(8, VOCAB)).eval()
        dit = make_dit()
        dit.blocks[0].attn_qkv = nn.Sequential(dit.blocks[0].attn_qkv, nn.Dropout(0.5).eval())
        for model, part, settings in (
            (bert().eval(), None, {"mask_id": 4}),
            (by_logits, by_logits[1], {"vocab_size": VOCAB, "mask_id": MASK}),
            (dit, dit.blocks[0].attn_qkv, {}),
        ):
            kept = adapt(model, **settings)
            mdkern.sample(kept, length=6)
            (part or model).train()
            with pytest.raises(ValueError, match=r"training mode.*call model\.eval\(\) first"):
                mdkern.sample(kept, length=6)

    def test_the_mask_id_must_be_known(self) -> None:
        with pytest.raises(ValueError, match="mask_id must be given: BertForMaskedLM does not tell it"):
            adapt(bert().eval())
        assert adapt(bert(mask_token_id=4).eval()).mask_id == 4

    def test_longest_input(self) -> None:
        """RoBERTa's positions start at its padding id + 1: two of its table's rows are never read."""
        for make, longest in ((bert, 12), (roberta, 10)):
            denoiser = adapt(make().eval(), mask_id=4)
            assert denoiser.max_length == longest
            assert mdkern.sample(denoiser, steps=2, seed=0).sequences.shape == (1, longest)
            with pytest.raises(ValueError, match=f"length must be at most {longest}"):
                mdkern.sample(denoiser, length=longest + 1, steps=2)

    def test_no_limit_of_the_length(self) -> None:
        """XLNet's config has -1."""
        model = bert().eval()
        model.config.max_position_embeddings = -1
        assert adapt(model, mask_id=4).max_length is None


class TestCallable:
    @pytest.mark.parametrize("schedule", [None, "L3 H3"])
    def test_same_samples_as_the_dit_inside(self, make_dit: MakeDiT, schedule: str | None) -> None:
        """With the split and without it, the draws are the same function of the same logits."""
        models = {"H": make_dit(seed=1), "L": make_dit(seed=2, num_blocks=1)}
        wrapped = {name: adapt(logits_of(model), vocab_size=VOCAB, mask_id=MASK) for name, model in models.items()}
        if schedule is None:
            models, wrapped = {"H": models["H"]}, {"H": wrapped["H"]}
        options: dict[str, Any] = {"num_samples": 12, "length": 10, "steps": 6, "seed": 5}
        with_split = mdkern.sample(models, schedule, **options)
        without = mdkern.sample(wrapped, schedule, **options)
        assert with_split.sequences.equal(without.sequences)
        assert with_split.sequences.unique(dim=0).shape[0] == 12

    def test_modules_are_callables(self) -> None:
        model = nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)).eval()
        out = mdkern.sample(adapt(model, vocab_size=VOCAB, mask_id=MASK), num_samples=5, length=7, steps=7, seed=0)
        assert (out.sequences < MASK).all()
        with pytest.raises(ValueError, match="training mode"):
            adapt(model.train(), vocab_size=VOCAB, mask_id=MASK)

    def test_a_module_that_moves_is_followed(self) -> None:
        model = nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)).eval()
        kept = adapt(model, vocab_size=VOCAB, mask_id=MASK)
        assert kept.current().device == torch.device("cpu")
        model.to("meta")
        now = kept.current()
        assert now.device == now.head.bias.device == torch.device("meta")

    @pytest.mark.parametrize("mask_id", [0, 2, 3])
    def test_mask_inside_the_logits_is_never_produced(self, mask_id: int) -> None:
        def favours_the_mask(input_ids: Tensor) -> Tensor:
            logits = torch.zeros(*input_ids.shape, 4)
            logits[..., mask_id] = 50.0
            return logits

        denoiser = adapt(favours_the_mask, vocab_size=4, mask_id=mask_id)
        assert denoiser.vocab_size == 4
        for temperature in (0.0, 1.0):
            out = mdkern.sample(denoiser, num_samples=20, length=6, steps=3, temperature=temperature, seed=0)
            assert (out.sequences != mask_id).all()

    def test_mask_one_past_the_logits(self) -> None:
        """Then every column may be produced, and ids run one further than the columns."""
        denoiser = adapt(lambda ids: torch.zeros(*ids.shape, 4), vocab_size=4, mask_id=4)
        assert denoiser.vocab_size == 5
        out = mdkern.sample(denoiser, input_ids=torch.tensor([[4, 3, 4, 4]]), num_samples=60, steps=4, seed=0)
        assert (out.sequences[:, 1] == 3).all()
        assert out.sequences[:, [0, 2, 3]].unique().tolist() == [0, 1, 2, 3]

    def test_t_is_the_time_of_the_events_step(self) -> None:
        """A forward pass sees, for each of its sequences, the time before the step that reveals its positions."""
        seen: list[tuple[Tensor, Tensor]] = []

        def watch(input_ids: Tensor, t: Tensor) -> Tensor:
            seen.append((input_ids.clone(), t.clone()))
            return torch.zeros(*input_ids.shape, 4)

        denoiser = adapt(watch, vocab_size=4, mask_id=4)
        assert denoiser.time_conditioning
        seen.clear()  # what `adapt` has tried
        steps, eps = 5, 0.1
        decoder = mdkern.Ancestral(eps)
        options: dict[str, Any] = {"length": 6, "steps": steps, "seed": 1, "batch_size": 1, "return_history": True}
        out = mdkern.sample(denoiser, num_samples=8, decoder=decoder, **options)
        ids, times = torch.cat([ids for ids, _ in seen]), torch.cat([t for _, t in seen])
        revealed_at = out.history.step
        assert len(times) == sum(int(row.unique().numel()) for row in revealed_at)
        passes = iter(zip(ids, times))
        for row in revealed_at:  # one sequence at a time, so that its passes are consecutive and in order
            for step in row.unique().tolist():
                state, t = next(passes)
                assert t == pytest.approx(1.0 - (1.0 - eps) * step / steps, abs=1e-6)
                assert ((state == 4) == (row >= step)).all()

    def test_without_a_parameter_t_none_is_given(self) -> None:
        def fixed(input_ids: Tensor) -> Tensor:
            return torch.zeros(*input_ids.shape, 4)

        assert not adapt(fixed, vocab_size=4, mask_id=4).time_conditioning
        assert adapt(print, vocab_size=4, mask_id=4).time_conditioning is False  # a builtin

    def test_attention_mask_is_given_to_those_who_take_it(self) -> None:
        masks: list[Tensor] = []

        def takes_mask(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            assert attention_mask is not None
            masks.append(attention_mask)
            return torch.zeros(*input_ids.shape, 4)

        ids, mask = torch.tensor([[4, 4, 0], [4, 4, 4]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
        denoiser = adapt(takes_mask, vocab_size=4, mask_id=4)
        out = mdkern.sample(denoiser, input_ids=ids, attention_mask=mask, steps=3, seed=0, batch_size=1)
        assert out.sequences[0, 2] == 0
        assert {tuple(row.int().tolist()) for mask in masks for row in mask} == {(1, 1, 0), (1, 1, 1)}

        def takes_none(input_ids: Tensor) -> Tensor:
            raise AssertionError("must not be run")

        with pytest.raises(ValueError, match="attention_mask must be None or all 1: takes_none takes none"):
            mdkern.sample(adapt(takes_none, vocab_size=4, mask_id=4), input_ids=ids, attention_mask=mask, steps=3)

    def test_functions_that_padding_changes_are_refused(self) -> None:
        """BERT's learned positions: a function must pass position ids on where padding comes before text."""
        model = bert().eval()

        def deaf(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return model(input_ids).logits

        def from_zero(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return model(input_ids, attention_mask).logits

        def told(input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Any = None) -> Tensor:
            return model(input_ids, attention_mask, position_ids=position_ids).logits

        text, columns = torch.tensor([[5, 6, 4, 4, 4]]), model.config.vocab_size
        alone = mdkern.sample(adapt(told, vocab_size=columns, mask_id=4), input_ids=text, seed=0).sequences

        def padded(function: Callable[..., Any], left: int) -> Tensor:
            ids, mask = (F.pad(x, (left, 3 - left)) for x in (text, torch.ones_like(text)))
            denoiser = adapt(function, vocab_size=columns, mask_id=4)
            return mdkern.sample(denoiser, input_ids=ids, attention_mask=mask, seed=0).sequences[:, left : left + 5]

        assert padded(told, 3).equal(alone)
        assert padded(from_zero, 0).equal(alone)
        with pytest.raises(ValueError, match=r"padding before text.*position_ids"):
            padded(from_zero, 3)
        with pytest.raises(ValueError, match="its states change with padding all the same"):
            padded(deaf, 0)

    @pytest.mark.parametrize(
        ("output", "given"),
        [
            (lambda ids: torch.zeros(*ids.shape, 3), r"torch\.float32 \(1, 6, 3\)"),
            (lambda ids: torch.zeros(ids.shape[0], 4), r"torch\.float32 \(1, 4\)"),
            (lambda ids: torch.zeros(*ids.shape, 4, dtype=torch.int64), r"torch\.int64 \(1, 6, 4\)"),
            (lambda ids: (torch.zeros(*ids.shape, 4),), "a tuple"),
            (lambda ids: None, "a NoneType"),
        ],
    )
    def test_output_that_is_no_logits_is_refused(self, output: Callable[[Tensor], Any], given: str) -> None:
        denoiser = adapt(output, vocab_size=4, mask_id=4, name="mine")
        with pytest.raises(ValueError, match=rf"mine gave {given}, expected floating logits \(1, 6, 4\)"):
            mdkern.sample(denoiser, length=6, steps=6, seed=0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mask_id": 3}, "vocab_size must be given: function does not tell it"),
            ({"vocab_size": 4}, "mask_id must be given: function does not tell it"),
            ({"vocab_size": 4, "mask_id": 5}, r"mask_id must lie in 0\.\.4 .* not 5"),
            ({"vocab_size": 4, "mask_id": -1}, r"mask_id must lie in 0\.\.4 .* not -1"),
            ({"vocab_size": 0, "mask_id": 0}, "vocab_size must be at least 1, not 0"),
            ({"vocab_size": 4.0, "mask_id": 3}, r"vocab_size must be a whole number, not 4\.0"),
            ({"vocab_size": 4, "mask_id": "3"}, "mask_id must be a whole number, not '3'"),
            ({"vocab_size": 4, "mask_id": 3, "device": "gpu"}, "device 'gpu' is not known"),
        ],
    )
    def test_impossible_descriptions_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            adapt(lambda ids: None, **options)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(ValueError, match="device cuda:1 was asked for"):
            adapt(lambda ids: None, vocab_size=4, mask_id=3, device="cuda:1")

    @pytest.mark.gpu
    def test_device_is_the_tensors_own(self) -> None:
        """Without its index ``cuda`` would differ from the ``cuda:0`` of every tensor there."""
        denoiser = adapt(lambda ids: torch.zeros(*ids.shape, 4, device="cuda"), vocab_size=4, mask_id=4, device="cuda")
        assert denoiser.device == torch.zeros(1, device="cuda").device
        assert mdkern.sample(denoiser, length=6, steps=6).sequences.shape == (1, 6)

    def test_what_is_no_model_is_refused(self) -> None:
        for thing, message in ((3, "callable, not int"), (None, "callable, not NoneType"), ("gpt2", "loaded first")):
            with pytest.raises(TypeError, match=message):
                adapt(thing)


class TestWarning:
    @pytest.fixture(autouse=True)
    def shown_once(self) -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            yield

    def test_that_the_output_layer_runs_everywhere_is_said_once(self) -> None:
        def somebodys(input_ids: Tensor) -> Tensor:
            return torch.zeros(*input_ids.shape, 4)

        with warnings.catch_warnings(record=True) as caught:
            denoiser = adapt(somebodys, vocab_size=4, mask_id=4)
            for seed in range(3):
                mdkern.sample(denoiser, length=6, steps=6, seed=seed)
        assert [str(entry.message).split(":")[0] for entry in caught] == ["somebodys runs by its logits"]
        assert caught[0].filename == __file__  # the line that adapts it

    def test_adapted_by_sample_it_is_said_once_too(self) -> None:
        model = bert(mask_token_id=4).eval()
        model.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits.tanh())  # it can't be split
        with warnings.catch_warnings(record=True) as caught:
            for seed in range(3):
                mdkern.sample(model, length=6, steps=6, seed=seed)
        assert len([entry for entry in caught if "runs by its logits" in str(entry.message)]) == 1
