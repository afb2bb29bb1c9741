"""The exact likelihood of a sampler with a deterministic order (DUEL, 2603.01367).

If the positions that a pass reveals are a function of the text before it, each text can be reached in one way only. So
the sampler is run with the true tokens in place of the drawn ones. The likelihood of a text is the product of the
probabilities that its tokens have in the passes that reveal them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mdkern.decoders import Decoder, Planned, Proposal, Stepwise, by_name
from mdkern.engine import stepwise
from mdkern.engine.groups import device_of, prepared
from mdkern.engine.hooks import Drafts
from mdkern.engine.progress import Settings
from mdkern.engine.propose import Propose, arranged, project, spread
from mdkern.engine.request import Request
from mdkern.engine.resolve import resolve
from mdkern.engine.slots import Slots
from mdkern.engine.state import IncompleteError, Outcome, SamplerState, Timings
from mdkern.evaluation.scores import target_logit
from mdkern.models import Denoiser
from mdkern.models.denoiser import Head
from mdkern.schedule import Schedule


def exact_nats(
    denoisers: dict[str, Denoiser],
    schedule: Schedule,
    decoder: Any,
    by: str | None,
    disable: bool | None = True,
    *,
    input_ids: Tensor,
    wanted: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log p of the wanted tokens given all others, float64 ``[N]``, and passes by model, int64 ``[N]`` each.

    Args:
        denoisers, schedule: as `mdkern.engine.resolve_models` gives them.
        decoder, by: see `mdkern.likelihood`.
        disable: of the progress bar, as tqdm takes it.
        input_ids, wanted, attention_mask: int64, bool, bool or None, ``[N, L]`` each: whole texts.
        options: further arguments of `mdkern.sample`.

    Raises:
        ValueError: a decoder that this is not the likelihood of, a given token that is the mask, and what
            `mdkern.sample` refuses.
        FloatingPointError: NaN or infinite logits.
        RuntimeError: a decoder that leaves masks for good.
    """
    decoder = check_decoder(decoder, by)
    mask_id = next(iter(denoisers.values())).mask_id
    attended = torch.ones_like(wanted) if attention_mask is None else attention_mask
    blank = (attended & ~wanted & (input_ids == mask_id)).nonzero()[:1].tolist()
    if blank:
        row, column = blank[0]
        raise ValueError(f"input_ids[{row}, {column}] is the mask and not wanted: a sampler would write it")
    masked = torch.where(wanted | ~attended, mask_id, input_ids)
    # At temperature 0 the decoder is shown the most probable tokens.
    asked = {"input_ids": masked, "attention_mask": attention_mask, "decoder": decoder, "temperature": 0.0}
    request = resolve(denoisers, None, schedule, seed=0, **asked, **options)
    true = TrueTokens.of(input_ids)
    outcome = run_forced(request, true.propose, disable)
    return -torch.where(wanted, true.log_prob[:-1], 0.0).double().sum(-1), outcome.nfe


def run_forced(request: Request, propose: Propose, disable: bool | None = True) -> Outcome:
    """Run a request, all samples in one group and without graphs, with tokens that `propose` gives.

    Raises:
        FloatingPointError: NaN or infinite logits.
        RuntimeError: a decoder that leaves masks for good.
    """
    state, drafts = SamplerState.of(request), Drafts(None, request.input_ids, ~request.masked)
    drafts.begin(0, state.input_ids)
    decode = partial(stepwise.decode_segment, propose=propose)
    with torch.no_grad(), device_of(request), tqdm(unit="pass", desc="likelihood", leave=False, disable=disable) as bar:
        request = prepared(request, len(request.input_ids))
        try:
            outcome = stepwise.run(request, state, None, bar, drafts, Timings(perf_counter()), decode)
        except IncompleteError as incomplete:
            raise incomplete.__cause__ or incomplete from None
    if outcome.failure is not None:
        raise outcome.failure
    if not bool(outcome.finished.all()):
        row, name = int((~outcome.finished).nonzero()[0, 0]), type(request.decoder).__name__
        raise RuntimeError(f"{name} left masks in row {row}: it must reveal every wanted position")
    return outcome


def check_decoder(decoder: Any, by: str | None) -> Any:
    """The decoder, where its reveals are a function of the text before them; all others are refused."""
    if by not in (None, "top1"):
        raise ValueError(f"by must be 'top1' or None, not {by!r}")
    decoder = by_name(decoder) if isinstance(decoder, str) else decoder
    if not isinstance(decoder, Decoder):
        return decoder  # `resolve` says what is wrong with it
    name = type(decoder).__name__
    if isinstance(decoder, Planned):
        raise ValueError(
            f"{name} draws its order before the first pass, so that its likelihood is a mean over orders: bound it with"
            " method='fixed_count', or give a decoder that looks at the model, such as 'margin'"
        )
    assert isinstance(decoder, Stepwise)
    if type(decoder).remask is not Stepwise.remask or type(decoder).edit is not Stepwise.edit:
        raise ValueError(
            f"{name} changes what it has revealed, so that a text is reached in many ways: its likelihood is not known"
        )
    if getattr(decoder, "position_temperature", 0.0) > 0.0:
        raise ValueError(f"{name} draws positions at random: its position_temperature must be 0")
    if decoder.scores_draw and by is None:
        raise ValueError(
            f"{name} scores the token that it draws, so that what it reveals is no function of the text before: give"
            " by='top1', for the likelihood of the sampler that scores the most probable token in its place"
        )
    if not decoder.scores_draw and by is not None:
        raise ValueError(f"by={by!r} changes nothing: {name} does not look at the drawn token. Leave it out")
    return decoder


@dataclass(frozen=True)
class TrueTokens:
    """What is revealed instead of drawn tokens, and how probable it was. Row N is scratch, for slots without work."""

    input_ids: Tensor  # int64 [N + 1, L], whole texts
    log_prob: Tensor  # float32 [N + 1, L], of each token in the last pass in which it was a candidate: it was revealed

    @staticmethod
    def of(input_ids: Tensor) -> TrueTokens:
        whole = torch.cat((input_ids, torch.zeros_like(input_ids[:1])))
        return TrueTokens(whole, torch.zeros(whole.shape, dtype=torch.float32, device=whole.device))

    def propose(
        self, head: Head, settings: Settings, state: SamplerState, slots: Slots, rows: Tensor, hidden: Tensor
    ) -> tuple[Proposal, Proposal]:
        """The most probable tokens for the decoder to look at, the true ones to reveal: a `Propose`."""
        row, place, statistics = project(head, settings, state, slots, rows, hidden)
        shown = arranged(statistics, place, rows.shape)
        if settings.most_passes is not None and settings.decoder.choose(slots.view, shown).temperature > 0.0:
            raise ValueError(f"{type(settings.decoder).__name__} draws positions at random: its temperature must be 0")
        true = self.input_ids[slots.sequence].gather(1, slots.column)
        logit = target_logit(head, hidden.flatten(0, 1), row, true.flatten()[row])
        log_prob = spread(logit - statistics.logsumexp, place, rows.shape, torch.nan)
        scratch = self.input_ids.numel() - 1
        at = torch.where(rows, slots.sequence[:, None] * self.input_ids.shape[1] + slots.column, scratch)
        self.log_prob.view(-1)[at] = log_prob
        return shown, shown._replace(token=torch.where(shown.token < 0, -1, true), probability=log_prob.exp())
