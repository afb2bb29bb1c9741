"""Loads models whose own code was written for another version of transformers than the one installed.

The code of LLaDA, LLaDA-MoE, Dream, SDAR and LLaDA 2 comes with the checkpoints (``trust_remote_code=True``) and
expects transformers 4. What transformers 5 has changed is restored while such a model is being loaded; once loaded, it
runs without that. What is restored:

- names that the code imports and that no longer exist (`GONE`);
- ``ROPE_INIT_FUNCTIONS["default"]``, the plain rotary frequencies;
- buffers that are not in the checkpoint, such as these frequencies. transformers 5 builds a model without memory and
  leaves such buffers uninitialised, without a warning, unless the code computes them a second time;
- ``tie_weights()`` and ``GenerationConfig.validate`` without later parameters, ``_tied_weights_keys`` as a list, models
  that never call ``post_init``, and ``config.use_cache``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

_lock = threading.RLock()  # because the changes apply to the whole process


class LossKwargs(TypedDict, total=False):
    """A stand-in for a class that old code uses in type annotations only."""

    num_items_in_batch: int


class SlidingWindowCache:
    """A stand-in for a class that old code uses in isinstance checks only."""


# By module of transformers. Each is added only where the module lacks it.
GONE: dict[str, dict[str, Any]] = {
    "transformers.utils": {
        "LossKwargs": LossKwargs,
        "is_flash_attn_greater_or_equal_2_10": lambda: True,
        "is_torch_flex_attn_available": lambda: True,
    },
    "transformers.utils.import_utils": {"is_torch_fx_available": lambda: True},
    "transformers.cache_utils": {"SlidingWindowCache": SlidingWindowCache},
    "transformers.pytorch_utils": {
        "ALL_LAYERNORM_LAYERS": [nn.LayerNorm],
        "is_torch_greater_or_equal_than_1_13": True,
    },
}


def load_module(name_or_path: str, auto_class: str, **options: Any) -> tuple[nn.Module, list[str]]:
    """Load a Hugging Face model in eval mode, also if its own code was written for transformers 4.

    Args:
        name_or_path: the name of a model on the Hugging Face Hub, or a folder.
        auto_class: name of the class of transformers that loads it, such as ``"AutoModelForMaskedLM"``.
        options: as for its ``from_pretrained``.

    Returns:
        The model, of the class that its config names, and the names of weights that the checkpoint lacks and that are
        not tied to others.
    """
    import transformers

    with old_model_code(), noted_missing() as noted:
        model = getattr(transformers, auto_class).from_pretrained(name_or_path, **options)
    weights = dict(model.named_parameters(remove_duplicate=False))
    missing = noted & weights.keys()
    read = {id(weight) for name, weight in weights.items() if name not in missing}
    return model.eval(), sorted(name for name in missing if id(weights[name]) not in read)


@contextmanager
def noted_missing() -> Iterator[set[str]]:
    """Inside this context, the names of weights that a checkpoint lacks are added to the set.

    A model's own ``from_pretrained`` may not be able to pass on ``output_loading_info``, so it is asked for further in.
    """
    from transformers import PreTrainedModel

    noted: set[str] = set()
    original = inspect.getattr_static(PreTrainedModel, "from_pretrained")

    def asked(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        model, found = function(*args, **(kwargs | {"output_loading_info": True}))
        noted.update(found["missing_keys"])
        return model

    setattr(PreTrainedModel, "from_pretrained", around(original, asked))  # noqa: B010 - mypy refuses the assignment
    try:
        yield noted
    finally:
        setattr(PreTrainedModel, "from_pretrained", original)  # noqa: B010


@contextmanager
def old_model_code() -> Iterator[None]:
    """Inside this context, the whole process has what code for transformers 4 needs.

    `mdkern.from_pretrained` calls ``AutoModel.from_pretrained(…, trust_remote_code=True)`` and the like in it.
    """
    from transformers import GenerationConfig, PreTrainedModel, modeling_rope_utils

    with _lock, ExitStack() as changes:
        for module_name, names in GONE.items():
            module = importlib.import_module(module_name)
            for name, value in names.items():
                if not hasattr(module, name):
                    setattr(module, name, value)
                    changes.callback(delattr, module, name)
        rotary = modeling_rope_utils.ROPE_INIT_FUNCTIONS
        if "default" not in rotary:
            rotary["default"] = default_frequencies
            changes.callback(rotary.pop, "default")
            loading = Loading()
            for kind, name, method in (
                (PreTrainedModel, "__init__", loading.initialize),
                (PreTrainedModel, "get_expanded_tied_weights_keys", tie_listed_weights),
                (PreTrainedModel, "_initialize_weights", initialize_missing_weights),
                (PreTrainedModel, "get_init_context", loading.build_in_memory),
                (PreTrainedModel, "from_pretrained", loading.restore_buffers),
                (GenerationConfig, "__init__", validate_leniently),
                (GenerationConfig, "update", validate_leniently),
            ):
                original = inspect.getattr_static(kind, name)
                changes.callback(setattr, kind, name, original)
                setattr(kind, name, around(original, method))
        yield


def default_frequencies(
    config: Any = None, device: torch.device | str | None = None, seq_len: int | None = None, **old: Any
) -> tuple[Tensor, float]:
    """Rotary frequencies ``base^(-2i/d)``, float32 ``[d / 2]``, and 1, the factor of cosines and sines.

    Args:
        config: with ``rope_theta`` or ``rope_parameters``, and ``head_dim`` or ``hidden_size`` and
            ``num_attention_heads``. None: `old` has ``base`` and ``dim``.
    """
    if config is None:
        base, width = old["base"], old["dim"]
    else:
        base = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = int(head_dim * (getattr(config, "partial_rotary_factor", None) or 1.0))
    exponent = torch.arange(0, width, 2, dtype=torch.int64).to(device=device, dtype=torch.float32) / width
    return 1.0 / base**exponent, 1.0


def around(original: Any, method: Callable[..., Any]) -> Any:
    """A replacement for the function or class method `original`: `method`, which gets it as its first argument."""
    function = original.__func__ if isinstance(original, classmethod) else original

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return method(function, *args, **kwargs)

    return classmethod(called) if isinstance(original, classmethod) else called


class Loading:
    """Wrappers around methods of `PreTrainedModel` of transformers 5 that keep what a model was constructed with."""

    def __init__(self) -> None:
        self.built: list[nn.Module] = []  # models, in the order in which their construction begins
        self.buffers: list[tuple[nn.Module, str, Tensor]] = []  # constructed buffers that are in no checkpoint

    def initialize(self, original: Callable[..., None], model: Any, *args: Any, **kwargs: Any) -> None:
        """Add what models lack that never call `post_init`."""
        original(model, *args, **kwargs)
        self.built.append(model)
        if "all_tied_weights_keys" not in vars(model):
            model.all_tied_weights_keys = {}
        if not hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        ignore_unknown_arguments(type(model), "tie_weights")

    def build_in_memory(self, original: Callable[..., list[Any]], *args: Any, **kwargs: Any) -> list[Any]:
        """Build the model in memory, which is not written to before the weights are read, not on the meta device."""
        from transformers import initialization

        return [*original(*args, **kwargs), initialization.no_init_weights(), torch.device("cpu"), self.seen()]

    @contextmanager
    def seen(self) -> Iterator[None]:
        """A context for the construction of a model, which keeps its buffers."""
        self.built.clear()
        yield
        self.buffers = [
            (module, name, buffer)
            for module in (self.built[0].modules() if self.built else ())
            for name in module._non_persistent_buffers_set
            if (buffer := module._buffers.get(name)) is not None
        ]

    def restore_buffers(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Give the model its buffers as they were constructed, on its device."""
        loaded = original(*args, **kwargs)
        for module, name, buffer in self.buffers:
            place = module._buffers.get(name)
            if place is not None and place.device.type != "meta":
                place.copy_(buffer)
        self.built, self.buffers = [], []
        return loaded


def tie_listed_weights(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Accept a list of names of tied weights, each of which is tied to the input embedding."""
    if isinstance(model._tied_weights_keys, list | tuple | set):
        embedding = model.get_input_embeddings().weight
        source = next(name for name, weight in model.named_parameters() if weight is embedding)
        model._tied_weights_keys = {name: source for name in model._tied_weights_keys if name != source}
    return original(model, *args, **kwargs)


def initialize_missing_weights(
    original: Callable[..., None], model: Any, module: nn.Module, *args: Any, **kwargs: Any
) -> None:
    """Do not initialise modules whose weights have all been read.

    Old code initialises everything in a module, and the first versions of transformers 5 call it.
    """
    if all(getattr(weight, "_is_hf_initialized", False) for weight in module.parameters(recurse=False)):
        module._is_hf_initialized = True  # type: ignore[assignment]
    else:
        original(model, module, *args, **kwargs)


def validate_leniently(original: Callable[..., Any], config: Any, *args: Any, **kwargs: Any) -> Any:
    """Call methods of `GenerationConfig` that call `validate`, though a class's own may have fewer parameters."""
    ignore_unknown_arguments(type(config), "validate")
    return original(config, *args, **kwargs)


def ignore_unknown_arguments(kind: type, name: str) -> None:
    """Make a method of a class ignore keyword arguments that it does not have."""
    method = getattr(kind, name)
    parameters = inspect.signature(method).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return

    @functools.wraps(method)
    def called(instance: Any, *args: Any, **kwargs: Any) -> Any:
        return method(instance, *args, **{key: value for key, value in kwargs.items() if key in parameters})

    setattr(kind, name, called)
