"""Model code written for transformers 4, loaded by whatever version is installed."""

from __future__ import annotations

import inspect
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, dynamic_module_utils, modeling_rope_utils

import mdkern
from mdkern.models.hf.compat import GONE, default_frequencies, load_module, old_model_code
from tests.problems import old_code
from tests.problems.hf_models import adapted, random_ids

WIDTH, HEADS, BLOCKS, WORDS, THETA = 16, 2, 2, 30, 500.0
CLASSES = ["OldWithPostInit", "OldWithoutPostInit"]
FIVE = int(transformers.__version__.split(".")[0]) >= 5


@pytest.fixture
def make_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A checkpoint with code of its own, and the weights in it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # of another folder

    def make(kind: str, **settings: Any) -> tuple[Path, dict[str, Tensor]]:
        folder = tmp_path / f"{kind}{'Tied' * bool(settings.get('tie_word_embeddings'))}"
        folder.mkdir()
        for file in Path(old_code.__file__).parent.glob("*_old.py"):
            shutil.copy(file, folder)
        auto_map = {"AutoConfig": "configuration_old.OldConfig", "AutoModel": f"modeling_old.{kind}"}
        config = {
            "model_type": "old", "architectures": [kind], "auto_map": auto_map, "rope_theta": THETA,
            "tie_word_embeddings": False, "use_cache": False, "mask_token_id": 27, "torch_dtype": "float32",
        } | settings  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
        generator = torch.Generator().manual_seed(0)
        shapes: dict[str, tuple[int, ...]] = {"model.embed.weight": (WORDS, WIDTH), "lm_head.weight": (WORDS, WIDTH)}
        for number in range(BLOCKS):
            for name, rows in (("qkv", 3 * WIDTH), ("out", WIDTH)):
                shapes[f"model.blocks.{number}.{name}.weight"] = (rows, WIDTH)
                shapes[f"model.blocks.{number}.{name}.bias"] = (rows,)
        if config["tie_word_embeddings"]:
            del shapes["lm_head.weight"]
        weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder, weights

    return make


def logits_by_hand(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The stand-ins' forward in float64, its rotations as complex numbers."""
    weights = {name: weight.double() for name, weight in weights.items()}
    x, half = weights["model.embed.weight"][ids], WIDTH // HEADS // 2
    place = torch.arange(ids.shape[1], dtype=torch.float64)[:, None]
    angle = place * torch.tensor([THETA ** (-index / half) for index in range(half)], dtype=torch.float64)
    rotation = torch.polar(torch.ones_like(angle), angle)
    for number in range(BLOCKS):
        block = {name: weights[f"model.blocks.{number}.{name}"] for name in ("qkv.weight", "qkv.bias", "out.weight")}
        parts = (x @ block["qkv.weight"].T + block["qkv.bias"]).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = (torch.complex(part[..., :half], part[..., half:]) * rotation for part in parts[:2])
        score = (q @ k.mH).real / math.sqrt(WIDTH // HEADS)
        attended = (score.softmax(-1) @ parts[2]).transpose(1, 2).flatten(2)
        x = x + attended @ block["out.weight"].T + weights[f"model.blocks.{number}.out.bias"]
    return x @ weights.get("lm_head.weight", weights["model.embed.weight"]).T


def load_pretrained(folder: str, auto_class: str = "AutoModel", **options: Any) -> Any:
    model, missing = load_module(folder, auto_class, **options)
    assert not missing
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_its_weights_and_frequencies_are_the_checkpoints(make_folder: Any, kind: str, tied: bool) -> None:
    folder, weights = make_folder(kind, tie_word_embeddings=tied)
    model = load_pretrained(str(folder), trust_remote_code=True)
    assert type(model).__name__ == kind
    assert not model.training
    state = model.state_dict()
    assert all(state[name].equal(weight) for name, weight in weights.items())
    ids = random_ids(2, 9)
    torch.testing.assert_close(model(ids).logits.double(), logits_by_hand(weights, ids), rtol=1e-4, atol=1e-4)
    denoiser = adapted(model)
    assert denoiser.takes_cache
    assert denoiser.takes_attention_mask
    assert denoiser.eos_ids == (3, 5)
    assert mdkern.sample(model, num_samples=2, length=8, seed=0).sequences.shape == (2, 8)


def test_its_code_and_its_facts_by_the_usual_door(make_folder: Any) -> None:
    folder, weights = make_folder("OldWithPostInit")
    denoiser = mdkern.from_pretrained(str(folder), trust_remote_code=True)
    assert (denoiser.mask_id, denoiser.eos_ids, denoiser.max_length) == (27, (3, 5), 24)
    ids = random_ids(2, 9)
    want = logits_by_hand(weights, ids)
    want[..., 27] = -torch.inf
    torch.testing.assert_close(denoiser.logits(ids).double(), want, rtol=1e-4, atol=1e-4)


def test_in_the_dtype_that_is_asked_for(make_folder: Any) -> None:
    folder, weights = make_folder("OldWithPostInit")
    model = load_pretrained(str(folder), trust_remote_code=True, dtype=torch.bfloat16)
    assert all(model.state_dict()[name].equal(weight.bfloat16()) for name, weight in weights.items())
    (frequencies,) = model.buffers()
    expected = torch.tensor([THETA ** (-index / 4) for index in range(4)])
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, expected)


def test_its_code_is_run_only_if_it_is_trusted(make_folder: Any) -> None:
    folder, _ = make_folder("OldWithPostInit")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_pretrained(str(folder), trust_remote_code=False)


def test_transformers_is_left_as_it_was(make_folder: Any) -> None:
    def state() -> list[Any]:
        names = [(module, name) for module, names in GONE.items() for name in names]
        there = [hasattr(__import__(module, fromlist=[name]), name) for module, name in names]
        methods = [inspect.getattr_static(PreTrainedModel, name) for name in ("__init__", "from_pretrained")]
        return [there, dict(modeling_rope_utils.ROPE_INIT_FUNCTIONS), methods]

    before, (folder, _) = state(), make_folder("OldWithoutPostInit")
    load_pretrained(str(folder), trust_remote_code=True)
    assert state() == before
    with pytest.raises(ZeroDivisionError), old_model_code():
        1 / ("default" not in modeling_rope_utils.ROPE_INIT_FUNCTIONS)
    assert state() == before


@pytest.mark.skipif(not FIVE, reason="transformers 4 needs less")
def test_without_it_such_code_does_not_load(make_folder: Any) -> None:
    """So that the stand-ins show when transformers needs none of this any more."""
    folder, _ = make_folder("OldWithPostInit")
    with pytest.raises(ImportError, match="cannot import name"):
        transformers.AutoModel.from_pretrained(str(folder), trust_remote_code=True)


def test_frequencies_of_old_arguments_and_of_new_settings() -> None:
    class New:
        head_dim, partial_rotary_factor, rope_parameters = 16, 0.5, {"rope_theta": 100.0}

    expected = torch.tensor([1.0, 100.0**-0.25, 100.0**-0.5, 100.0**-0.75])
    for found, factor in (default_frequencies(New()), default_frequencies(None, base=100.0, dim=8)):
        torch.testing.assert_close(found, expected)
        assert factor == 1.0


def test_models_of_transformers_itself_load_as_ever(tmp_path: Path) -> None:
    from tests.problems.hf_models import bert, llama

    for model in (bert(), llama()):
        model.save_pretrained(tmp_path / type(model).__name__)
        auto_class = "AutoModelForMaskedLM" if "Masked" in type(model).__name__ else "AutoModelForCausalLM"
        again = load_pretrained(str(tmp_path / type(model).__name__), auto_class)
        assert type(again) is type(model)
        state = again.state_dict()
        assert all(state[name].equal(weight) for name, weight in model.state_dict().items())
