"""Finds out what can be done with a model by trying it: a few passes over a few ids, compared with the model's own.

Classes and names are not relied on. A model is split if its own logits are those that its output layer's weight makes
from the layer's input. It gets a KV cache if windows with a cache give what full passes give. It takes padding if a
padded sequence gives what it gives alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mdkern.models.denoiser import Head, available_device
from mdkern.models.fingerprint import fingerprint, remembered
from mdkern.models.hf.adapted import LogitsDenoiser, Padding
from mdkern.models.hf.intercept import HeadPass, Layout, WatchedAttention, WatchedInputs
from mdkern.models.hf.introspect import (
    OutputLayer,
    accepted_arguments,
    execution_device,
    first_setting,
    output_layer,
)
from mdkern.models.hf.llama_parts import UnlikeLlamaError, plan_of
from mdkern.models.hf.pass_trial import PassTrial
from mdkern.models.hf.split import Anatomy, SplitDenoiser, square_mask
from mdkern.models.hf.trial import LENGTH, Trial

logger = logging.getLogger(__name__)

PROBED_BLOCK = 4  # length of the blocks of a probe's text
LONG = 1024  # length of the probe of models that make an attention mask, as it may hide only what is far away
LARGEST_BUFFER = 1 << 16  # numbers of a buffer of which it is noticed that it was changed in place
ONE_LAYER = 0.1  # share of it that is allowed for logits from the same states
LOCAL_ATTENTION = ("sliding_window", "local_attention", "attention_chunk_size", "window_size")  # longer than a probe


class Examined(NamedTuple):
    """What was found out about a module, which holds while its state is this one and its buffers are as they were."""

    state: Any
    anatomy: Anatomy
    buffers: Tensor | None  # see `small_buffers`


_examined: WeakKeyDictionary[nn.Module, Examined] = WeakKeyDictionary()


def examine(
    model: Any,
    vocab_size: int,
    max_length: int | None,
    device: torch.device | str | None = None,
    blocks: int | None = None,
) -> Anatomy:
    """Find out a model's anatomy: once for a module while it does not change, and each time for a function.

    Args:
        device: the device of a function's ids.
        blocks: length of the blocks of block-causal attention, which then replaces the model's own.
    """
    place = available_device(device or execution_device(model) or "cpu")
    if not isinstance(model, nn.Module):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return whole(model, "it is no module", vocab_size, min(max_length or LENGTH, LENGTH), place)
    autocast: Any = None
    if place.type != "meta":
        autocast = torch.is_autocast_enabled(place.type), torch.get_autocast_dtype(place.type)
    state = fingerprint(model), vocab_size, max_length, autocast, blocks
    known = _examined.get(model)
    if known is None or known.state != state or not same(known.buffers, small_buffers(model, known.anatomy)):
        with torch.no_grad():
            anatomy = dissect(model, vocab_size, max_length or LONG, place, blocks)
        buffers = small_buffers(model, anatomy)
        known = _examined[model] = Examined(state, anatomy, buffers)
    return known.anatomy


def small_buffers(model: nn.Module, anatomy: Anatomy) -> Tensor | None:
    """The bytes of a model's small buffers, if it has a plan; None if it has none.

    Angles are computed from them once, and mdkern's own passes do not read the others. So if one is changed in place it
    must be found out anew whether the passes give what the model gives.
    """
    if anatomy.plan is None:
        return None

    def find() -> list[Tensor]:
        plain = [buffer for buffer in model.buffers() if type(buffer) is Tensor and buffer.layout == torch.strided]
        return [x for x in plain if x.numel() <= LARGEST_BUFFER and not x.is_meta and not x.is_quantized]

    buffers, device = remembered(model, "buffers", find), anatomy.plan.cos.device
    parts = [buffer.detach().reshape(-1).view(torch.uint8).to(device) for buffer in buffers]
    return torch.cat(parts) if parts else None


def same(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours.device == theirs.device and torch.equal(ours, theirs)


def dissect(
    model: nn.Module, vocab_size: int, longest: int, device: torch.device, blocks: int | None = None
) -> Anatomy:
    layer = output_layer(model)
    reason = ""
    if hasattr(model, "_orig_mod"):
        reason = "it was compiled by torch.compile (adapt the model itself: its passes are captured in CUDA graphs)"
    elif any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules()):
        reason = "its weights are kept elsewhere and brought in by accelerate"
    elif any(parameter.device.type == "meta" for parameter in model.parameters()):
        return Anatomy("it is on the meta device")
    elif len({parameter.device for parameter in model.parameters()}) > 1:
        reason = "its layers are on several devices"
    elif isinstance(layer, str):
        reason = layer
    else:
        try:
            return Probe(model, layer, min(vocab_size, len(layer.weight)), longest, blocks).anatomy()
        except torch.OutOfMemoryError:
            raise
        except CannotBeSplitError as error:
            reason = str(error)
        except Exception as error:  # the model's own code may raise anything
            reason = f"a pass without its output layer failed: {first_line(error)}"
    return whole(model, reason, vocab_size, longest, device)


def whole(model: Any, reason: str, vocab_size: int, longest: int, device: torch.device) -> Anatomy:
    """The anatomy of a model that runs by its logits: what it sees, and how padding is passed to it."""

    def denoiser(padding: Padding) -> LogitsDenoiser:
        facts: dict[str, Any] = {"vocab_size": vocab_size, "mask_id": 0, "name": "the probe"}
        return LogitsDenoiser(model, reason=reason, padding=padding, device=device, **facts)

    ways = ["bool", "int64"] if "attention_mask" in accepted_arguments(model) else []
    direction, tried = "", isinstance(model, nn.Module)
    for most in dict.fromkeys((longest, min(longest, LENGTH))):  # where nothing tells how long a text may be
        trial = Trial(model, vocab_size, most, device)
        try:
            direction, tried = trial.direction(denoiser(Padding())), True
            break
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it may need more than ids; what is wrong with it is said when it is sampled from
            logger.debug("%s could not be tried: %s", type(model).__name__, first_line(error))
    untried = Padding("untried" if ways else "")
    return Anatomy(reason, direction=direction, padding=trial.padding(ways, denoiser) if tried else untried)


def logits_of(output: Any) -> Any:
    return getattr(output, "logits", output[0] if isinstance(output, tuple) and output else output)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class CannotBeSplitError(Exception):
    """The reason, in words that follow "because"."""


class Probe(PassTrial):
    """Passes of a model that is to be split."""

    def __init__(
        self, model: nn.Module, layer: OutputLayer, vocab_size: int, longest: int, blocks: int | None = None
    ) -> None:
        super().__init__(model, layer.weight, vocab_size, longest)
        self.bias, self.blocks = layer.bias, blocks
        self.arguments: dict[str, Any] = {"t": self.t} if "t" in self.accepted else {}
        self.told_mask = False
        if blocks is not None:
            self.spare = PROBED_BLOCK  # padding must not shift the blocks

    def call(self, input_ids: Tensor, **more: Any) -> Any:
        """The model's output."""
        told = {"attention_mask": square_mask(input_ids)} if self.told_mask else {}
        return self.model(input_ids, **self.arguments, **told, **more)

    def needs_mask(self) -> bool:
        """Whether the call fails without a mask."""
        try:
            self.call(self.ids)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # with a mask it is tried again
            return "attention_mask" in self.accepted
        return False

    def anatomy(self) -> Anatomy:
        if self.blocks is not None:
            self.told_mask = self.needs_mask()
        lean = "use_cache" in self.accepted and self.runs_lean()
        if lean:
            self.arguments["use_cache"] = False
        head, layout = self.head()._replace(lean=lean, told_mask=self.told_mask), self.layout()
        anatomy = self.cache(head, layout)
        if self.blocks is not None:
            if anatomy.layout is None:
                raise CannotBeSplitError(f"its attention cannot be made block-causal: {anatomy.no_cache}")
            anatomy = self.soft(anatomy._replace(padding=self.padding(["attention"], self.padded(anatomy))))
            return self.backbone(anatomy)._replace(blocks=self.blocks)
        ways = ["attention"] if isinstance(layout, Layout) else []
        ways += ["bool", "int64"] if "attention_mask" in self.accepted else []
        anatomy = self.soft(anatomy._replace(padding=self.padding(ways, self.padded(anatomy))))
        return self.backbone(anatomy._replace(direction=self.direction(self.denoiser(anatomy))))

    def runs_lean(self) -> bool:
        """Whether use_cache=False changes nothing; it makes some versions' attention causal."""
        plain, lean = (logits_of(self.call(self.ids, **more)) for more in ({}, {"use_cache": False}))
        comparable = isinstance(plain, Tensor) and isinstance(lean, Tensor) and plain.shape == lean.shape
        return not comparable or self.close(lean, plain)

    def head(self) -> Anatomy:
        """The anatomy with the scale, soft cap and bias that turn hidden states into the model's own logits."""
        with HeadPass(self.weight) as run:
            self.call(self.ids)
        hidden, bias = run.hidden, run.bias
        if hidden is None or run.calls != 1:
            raise CannotBeSplitError(f"its forward runs its output embedding {run.calls} times, not once")
        if hidden.shape != (*self.ids.shape, self.weight.shape[1]):
            raise CannotBeSplitError(f"its output embedding is given {tuple(hidden.shape)}, not [B, L, D]")
        if bias is not None and bias is not self.bias:
            raise CannotBeSplitError("its output embedding is run with a bias that is not its own")
        logits = logits_of(self.call(self.ids))
        if not isinstance(logits, Tensor) or logits.shape != (*self.ids.shape, len(self.weight)):
            raise CannotBeSplitError("its output is not the logits of its output embedding")
        for scale, soft_cap in self.shapings():
            shift = torch.zeros(len(self.weight), device=self.weight.device) if bias is None else scale * bias.float()
            ours = Head(self.weight, shift, scale, soft_cap).logits(hidden.to(self.weight.dtype))
            if self.close(ours, logits, ONE_LAYER):
                return Anatomy("", scale, soft_cap, bias is not None)
        raise CannotBeSplitError("its logits are not a linear function of what its output embedding is given")

    def shapings(self) -> list[tuple[float, float]]:
        """Pairs of scale and soft cap to try: those of most models, and of LLaDA, Cohere, Granite and Gemma 2."""
        settings = (first_setting(self.model, name) for name in ("logit_scale", "logits_scaling", "d_model"))
        multiply, divide, width = (value if isinstance(value, int | float) and value > 0 else 1.0 for value in settings)
        cap = first_setting(self.model, "final_logit_softcapping")
        scales = dict.fromkeys((1.0, width**-0.5, float(multiply), 1.0 / divide))
        return [(scale, cap) for cap in dict.fromkeys((0.0, float(cap or 0.0))) for scale in scales]

    def padded(self, anatomy: Anatomy) -> Callable[[Padding], SplitDenoiser]:
        return lambda padding: self.denoiser(anatomy._replace(padding=padding))

    def denoiser(self, anatomy: Anatomy) -> SplitDenoiser:
        return SplitDenoiser(self.model, anatomy, vocab_size=self.vocab_size, mask_id=0, name="the probe")

    def cache(self, anatomy: Anatomy, layout: Layout | str) -> Anatomy:
        """The anatomy with the layout of a KV cache, or the reason why there can be none."""
        if isinstance(layout, str):
            return anatomy._replace(no_cache=layout)
        ways = [""] if "position_ids" in self.accepted else []
        ways += [name for name, module in self.model.named_modules() if turns_queries_and_keys(module)][:1]
        reason = "its call takes no position_ids"
        blocks = None if self.blocks is None else PROBED_BLOCK
        for way in ways:
            found = anatomy._replace(layout=layout, rotary=way, padding=Padding("attention"), no_cache="")
            tried = found._replace(blocks=blocks)
            try:
                own = self.denoiser(tried)
                if self.windows_agree(own, self.unsteadiness(own)):
                    return tried
                reason = "windows over kept keys and values do not give what full passes give"
            except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
                reason = f"a pass of a window failed: {first_line(error)}"
        return anatomy._replace(no_cache=reason)

    def soft(self, anatomy: Anatomy) -> Anatomy:
        """The anatomy with the table in which the model looks up its ids, or the reason why these can't be mixed."""
        watched = WatchedInputs(self.ids)
        with HeadPass(self.weight, None, watched):
            self.call(self.ids)
        names = [
            name
            for name, parameter in self.model.named_parameters()
            if any(parameter is table for table in watched.tables)
        ]
        if len(watched.tables) != 1 or not names:
            return anatomy._replace(no_soft=f"its forward looks up its ids {len(watched.tables)} times, not once")
        tried = anatomy._replace(embedding=names[0], no_soft="")
        try:
            if self.mixtures_agree(self.denoiser(tried)):
                return tried
            reason = "ids that are mixed with the mask to nothing but the mask do not give what the mask gives"
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            reason = f"a pass of mixed ids failed: {first_line(error)}"
        return anatomy._replace(no_soft=reason)

    def mixtures_agree(self, denoiser: SplitDenoiser) -> bool:
        """Whether whole tokens give what ids give, and tokens of which nothing is left what the mask gives."""
        denoiser.mask_id = int(self.ids[0, 0])  # any id that is not the padding's
        some = torch.arange(self.length, device=self.device) % 3 == 1
        masks = self.ids.masked_fill(some, denoiser.mask_id)
        one = torch.ones_like(self.ids, dtype=torch.float32)
        return all(
            self.close(denoiser.softened(weight).hidden(self.ids, self.t), denoiser.hidden(ids, self.t))
            for weight, ids in ((one, self.ids), (one.masked_fill(some, 0.0), masks))
        )

    def layout(self) -> Layout | str:
        local = first_setting(self.model, *LOCAL_ATTENTION)
        if local and first_setting(self.model, "use_sliding_window") is not False:
            return f"some of its attention is local, with a window of {local}"
        if self.length < LENGTH // 2:
            return "its sequences are too short for windows"
        watched = self.watch(self.ids)
        if watched.masked and not watched.reason and self.blocks is None:
            watched = self.watch(self.ids.repeat(1, LONG // self.length)[:, : self.longest])
        return watched.layout()

    def watch(self, input_ids: Tensor) -> WatchedAttention:
        heads = first_setting(self.model, "num_key_value_heads", "n_kv_heads")
        watched = WatchedAttention(heads if isinstance(heads, int) else None, self.blocks is not None)
        with HeadPass(self.weight, watched):
            self.call(input_ids)
        return watched

    def backbone(self, anatomy: Anatomy) -> Anatomy:
        """The anatomy with the plan of mdkern's own passes, or the reason why the model's forward must run."""
        if anatomy.layout is None:
            return anatomy._replace(own_forward=anatomy.no_cache)
        if "t" in self.accepted:
            return anatomy._replace(own_forward="it is conditioned on the time")
        try:
            head = OutputLayer(self.weight, self.bias)
            plan = plan_of(self.model, head, anatomy.layout.head_dim, anatomy.rotary, self.longest)
            tried = anatomy._replace(plan=plan, own_forward="")
            if self.passes_agree(self.denoiser(tried), self.denoiser(anatomy)):
                return tried
            reason = "mdkern's own passes do not give what it gives"
        except UnlikeLlamaError as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the model's own rotary embedding and norms are called, too
            reason = f"one of mdkern's own passes failed: {first_line(error)}"
        return anatomy._replace(own_forward=reason)


def turns_queries_and_keys(module: nn.Module) -> bool:
    """Whether it is a rotary embedding like LLaDA's, which takes queries and keys and rotates them by their index."""
    return {"q", "k"} <= accepted_arguments(module)
