"""What can be done with somebody's model, found out by trying: a few passes of a few ids, compared with its own.

Nothing is taken on trust from a class or a name. The model is split if its output layer's weight makes its own logits
of what that layer is given; keys and values are kept if windows over them give what full passes give; padding is taken
if a padded sequence gives what it gives alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mdkern.models.denoiser import Head
from mdkern.models.hf.intercept import HeadPass, Layout, WatchedAttention
from mdkern.models.hf.introspect import accepted_arguments, first_setting, output_layer
from mdkern.models.hf.split import Anatomy, SplitDenoiser

SEQUENCES, LENGTH = 2, 10  # of a probe
LONG = 1024  # of the probe of models that make a mask for their attention: it may hide what is far away only
# Largest difference between two ways to compute the same states: its root mean square over that of what is compared.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
ONE_LAYER = 0.1  # of it, for logits from the same states
LOCAL_ATTENTION = ("sliding_window", "local_attention", "attention_chunk_size", "window_size")  # longer than a probe

_examined: WeakKeyDictionary[nn.Module, tuple[Any, Anatomy | str]] = WeakKeyDictionary()


def examine(model: Any, vocab_size: int, max_length: int | None) -> Anatomy | str:
    """A model's anatomy, or why it can't be split. Found out once for a model as it is."""
    from mdkern.models.fingerprint import fingerprint  # which imports the models

    layer = output_layer(model)
    if isinstance(layer, str):
        return layer
    weight = layer.weight
    assert isinstance(weight, Tensor)
    autocast = torch.is_autocast_enabled(weight.device.type), torch.get_autocast_dtype(weight.device.type)
    state = fingerprint(model), vocab_size, max_length, autocast
    known = _examined.get(model)
    if known is None or known[0] != state:
        with torch.no_grad():
            known = state, dissect(model, weight, vocab_size, max_length)
        _examined[model] = known
    return known[1]


def dissect(model: nn.Module, weight: Tensor, vocab_size: int, max_length: int | None) -> Anatomy | str:
    if hasattr(model, "_orig_mod"):
        return "it was compiled by torch.compile (adapt the model itself: its passes are captured in CUDA graphs)"
    if weight.device.type == "meta":
        return "it is on the meta device"
    if any(parameter.device != weight.device for parameter in model.parameters()):
        return "its layers are on several devices"
    probe = Probe(model, weight, min(vocab_size, len(weight)), max_length or LONG)
    try:
        anatomy = probe.head()
        return anatomy if isinstance(anatomy, str) else probe.padding(probe.cache(anatomy))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever somebody's code may raise
        return f"a pass without its output layer failed: {first_line(error)}"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Probe:
    """Passes of a model over a few ids."""

    def __init__(self, model: nn.Module, weight: Tensor, vocab_size: int, longest: int) -> None:
        self.model, self.weight, self.vocab_size, self.longest = model, weight, vocab_size, longest
        self.length = min(LENGTH, longest)
        self.accepted = accepted_arguments(model)
        shape, generator = (2, SEQUENCES, self.length), torch.Generator().manual_seed(0)
        self.ids, self.other_ids = torch.randint(vocab_size, shape, generator=generator).to(weight.device)
        self.t = torch.full((SEQUENCES,), 0.5, device=weight.device)
        self.arguments: dict[str, Any] = {"use_cache": False} if "use_cache" in self.accepted else {}
        if "t" in self.accepted:
            self.arguments["t"] = self.t

    def head(self) -> Anatomy | str:
        """The scale, soft cap and bias that make the model's own logits of its hidden states, or why none do."""
        with HeadPass(self.weight) as run:
            self.model(self.ids, **self.arguments)
        hidden, bias = run.hidden, run.bias
        if hidden is None or run.calls != 1:
            return f"its forward runs its output embedding {run.calls} times, not once"
        if hidden.shape != (*self.ids.shape, self.weight.shape[1]):
            return f"its output embedding is given {tuple(hidden.shape)}, not [B, L, D]"
        output = self.model(self.ids, **self.arguments)
        logits = getattr(output, "logits", output[0] if isinstance(output, tuple) and output else output)
        if not isinstance(logits, Tensor) or logits.shape != (*self.ids.shape, len(self.weight)):
            return "its output is not the logits of its output embedding"
        for scale, soft_cap in self.shapings():
            shift = torch.zeros(len(self.weight), device=self.weight.device) if bias is None else scale * bias.float()
            ours = Head(self.weight, shift, scale, soft_cap).logits(hidden.to(self.weight.dtype))
            if self.close(ours, logits, ONE_LAYER):
                return Anatomy(scale, soft_cap, bias)
        return "its logits are not a linear function of what its output embedding is given"

    def shapings(self) -> list[tuple[float, float]]:
        """Scales and soft caps to try: those of most models, LLaDA, Cohere, Granite and Gemma 2."""
        settings = (first_setting(self.model, name) for name in ("logit_scale", "logits_scaling", "d_model"))
        multiply, divide, width = (value if isinstance(value, int | float) and value > 0 else 1.0 for value in settings)
        cap = first_setting(self.model, "final_logit_softcapping")
        scales = dict.fromkeys((1.0, width**-0.5, float(multiply), 1.0 / divide))
        return [(scale, cap) for cap in dict.fromkeys((0.0, float(cap or 0.0))) for scale in scales]

    def close(self, ours: Tensor, theirs: Tensor, part: float = 1.0) -> bool:
        """Whether two computations agree to rounding; not where there is a NaN."""
        ours, theirs = ours.double(), theirs.double()
        bound = part * max(CLOSE.get(dtype, 0.0) for dtype in (self.weight.dtype, next(self.model.parameters()).dtype))
        return bool((ours - theirs).square().mean().sqrt() <= bound * theirs.square().mean().sqrt())

    def denoiser(self, anatomy: Anatomy) -> SplitDenoiser:
        return SplitDenoiser(self.model, anatomy, vocab_size=self.vocab_size, mask_id=0, name="the probe")

    def cache(self, anatomy: Anatomy) -> Anatomy:
        """With how keys and values can be kept, or why they can't."""
        layout = self.layout()
        if isinstance(layout, str):
            return replace(anatomy, no_cache=layout)
        ways = [""] if "position_ids" in self.accepted else []
        ways += [name for name, module in self.model.named_modules() if turns_queries_and_keys(module)][:1]
        reason = "its call takes no position_ids"
        for way in ways:
            tried = replace(anatomy, layout=layout, rotary=way, padding="attention", no_cache="")
            try:
                if self.windows_agree(self.denoiser(tried)):
                    return tried
                reason = "windows over kept keys and values do not give what full passes give"
            except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
                reason = f"a pass of a window failed: {first_line(error)}"
        return replace(anatomy, no_cache=reason)

    def layout(self) -> Layout | str:
        local = first_setting(self.model, *LOCAL_ATTENTION)
        if local and first_setting(self.model, "use_sliding_window") is not False:
            return f"some of its attention is local, with a window of {local}"
        if self.length < LENGTH // 2:
            return "its sequences are too short for windows"
        watched = self.watch(self.ids)
        if watched.masked and not watched.reason:
            watched = self.watch(self.ids.repeat(1, LONG // self.length)[:, : self.longest])
        return watched.layout()

    def watch(self, input_ids: Tensor) -> WatchedAttention:
        heads = first_setting(self.model, "num_key_value_heads", "n_kv_heads")
        watched = WatchedAttention(heads if isinstance(heads, int) else None)
        with HeadPass(self.weight, watched):
            self.model(input_ids, **self.arguments)
        return watched

    def windows_agree(self, denoiser: SplitDenoiser) -> bool:
        """Fill a cache, run all columns anew with other ids, then some: each time what full passes give must come."""
        length, device = self.length, self.weight.device
        everything = torch.arange(length, device=device).expand(SEQUENCES, -1)
        some = torch.tensor([[1], [length - 2]], device=device) + torch.arange(length // 2 - 1, device=device)
        cache = torch.zeros(denoiser.cache_shape(SEQUENCES, length), dtype=denoiser.dtype, device=device)
        for ids, columns in ((self.ids, None), (self.other_ids, everything), (self.other_ids, some.clamp(max=length))):
            at = everything if columns is None else columns
            inside = at.clamp(max=length - 1)
            rows = torch.arange(at.shape[1], device=device).expand(SEQUENCES, -1)
            ours = denoiser.window_hidden(cache, ids.gather(1, inside), columns, rows, self.t)
            theirs = denoiser.hidden(ids, self.t, inside)
            if not self.close(ours[at < length], theirs[at < length]):
                return False
        return True

    def padding(self, anatomy: Anatomy) -> Anatomy:
        """With where it can be told of padding."""
        ways = ["attention"] if anatomy.layout or isinstance(self.layout(), Layout) else []
        ways += ["attention_mask"] if "attention_mask" in self.accepted else []
        for way in ways:
            tried = replace(anatomy, padding=way)
            try:
                if self.padding_is_unseen(self.denoiser(tried)):
                    return tried
            except (TypeError, ValueError, RuntimeError, IndexError, AssertionError):
                continue
        return replace(anatomy, padding="")

    def padding_is_unseen(self, denoiser: SplitDenoiser) -> bool:
        """Whether text before padding is what it is alone, and the same to the last bit whatever the padding holds."""
        text = max(1, self.length - 3)
        mask = torch.arange(self.length, device=self.weight.device).expand(SEQUENCES, -1) < text
        first, second = (
            denoiser.hidden(torch.where(mask, self.ids, padding), self.t, None, mask)[:, :text]
            for padding in (self.ids, self.other_ids)
        )
        return first.equal(second) and self.close(first, denoiser.hidden(self.ids[:, :text], self.t))


def turns_queries_and_keys(module: nn.Module) -> bool:
    """Whether it is a rotary embedding as LLaDA's: queries and keys in, the same turned by their index out."""
    return {"q", "k"} <= accepted_arguments(module)
