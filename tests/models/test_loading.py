"""`mdkern.from_pretrained`: what is in a folder is found, and what is no masked diffusion model is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

import mdkern
from mdkern import DiT, DiTConfig
from mdkern.models.hf.split import SplitDenoiser
from mdkern.models.tokenizers import end_of_turn, mask_of
from tests.problems import old_code
from tests.problems.checkpoints import END, MASK, TURN, WORDS, make_tokenizer, save
from tests.problems.hf_models import ENCODER, bert, llama, modern_bert, random_ids

SMALL = DiTConfig(vocab_size=WORDS, mask_id=MASK, eos_id=END, max_length=24, num_blocks=1, width=16, num_heads=2)


def own_code(folder: Path, **settings: Any) -> str:
    """A checkpoint with code of its own, as LLaDA's and Dream's."""
    auto_map = {"AutoConfig": "configuration_old.OldConfig", "AutoModel": "modeling_old.OldWithPostInit"}
    path = save(folder, None, None, model_type="old", architectures=["OldWithPostInit"], auto_map=auto_map, **settings)
    for file in Path(old_code.__file__).parent.glob("*_old.py"):
        shutil.copy(file, folder)
    return path


def test_a_masked_language_model_with_all_that_is_known_about_it(tmp_path: Path) -> None:
    theirs = bert()
    path = save(tmp_path / "bert", theirs, make_tokenizer(), mask_token_id=None)
    model = mdkern.from_pretrained(path)
    assert isinstance(model, SplitDenoiser)
    assert type(model.model) is type(theirs)
    ids = random_ids(2, 9)
    torch.testing.assert_close(model.model(ids).logits, theirs(ids).logits)
    assert (model.vocab_size, model.mask_id, model.max_length) == (WORDS, MASK, 24)
    assert model.eos_ids == (END, TURN)  # of the tokenizer, and of its chat template
    out = mdkern.sample(model, num_samples=2, length=8, steps=4, seed=0)
    assert len(out.decode(model.tokenizer)) == 2


def test_modern_bert_is_one_and_its_settings_are_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "modern", modern_bert(), make_tokenizer())
    model = mdkern.from_pretrained(path, eos_id=[9, 8], dtype="bfloat16", device_map="cpu", name="M")
    assert (model.eos_ids, model.dtype, model.name) == ((9, 8), torch.bfloat16, "M")


def test_what_its_config_does_not_say_is_passed_on(tmp_path: Path) -> None:
    path = save(tmp_path / "llama", llama(), make_tokenizer())
    model = mdkern.from_pretrained(path, block_causal=4, shifted=True)
    assert (model.block_causal, model.shifted) == (4, True)  # type: ignore[attr-defined]


def test_a_dit_and_a_training_run_with_its_tokenizer(tmp_path: Path) -> None:
    DiT(SMALL).save_pretrained(tmp_path / "run" / "final")
    (tmp_path / "run" / "data" / "tokenizer").mkdir(parents=True)
    make_tokenizer(template=None).save_pretrained(tmp_path / "run" / "data" / "tokenizer")
    model = mdkern.from_pretrained(tmp_path / "run")
    assert isinstance(model.model, DiT)  # type: ignore[attr-defined]
    assert (model.mask_id, model.eos_ids, model.tokenizer.mask_token_id) == (MASK, (END,), MASK)
    assert mdkern.from_pretrained(tmp_path / "run" / "final").tokenizer is None
    with pytest.raises(ValueError, match="attn_implementation has no effect"):
        mdkern.from_pretrained(tmp_path / "run", attn_implementation="eager")
    with pytest.raises(ValueError, match="mask_id=4 contradicts"):
        mdkern.from_pretrained(tmp_path / "run", mask_id=4)


def test_from_the_cache_of_the_hub_and_without_a_network(tmp_path: Path) -> None:
    cache, commit = tmp_path / "cache", "0" * 40
    snapshot = cache / "models--owner--name" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    save(snapshot, bert(), make_tokenizer())
    (cache / "models--owner--name" / "refs").mkdir()
    (cache / "models--owner--name" / "refs" / "main").write_text(commit)
    model = mdkern.from_pretrained("owner/name", cache_dir=cache, local_files_only=True)
    assert (model.mask_id, len(model.tokenizer)) == (MASK, WORDS)
    with pytest.raises(FileNotFoundError, match="no model at owner/other: there is no such folder here, and the Hugg"):
        mdkern.from_pretrained("owner/other", cache_dir=cache, local_files_only=True)
    with pytest.raises(FileNotFoundError, match=r"no model at owner/name: .* does not give it"):
        mdkern.from_pretrained("owner/name", cache_dir=cache, local_files_only=True, revision="other")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.mark.usefixtures("elsewhere")
def test_its_own_code_is_run_only_if_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    path = own_code(tmp_path / "own", mask_token_id=MASK)
    with pytest.raises(ValueError, match=r"comes with code of its own, .* trust_remote_code=True \(--trust-remote-co"):
        mdkern.from_pretrained(path)
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors"):
        mdkern.from_pretrained(path, trust_remote_code=True)


@pytest.mark.usefixtures("elsewhere")
def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    path = save(tmp_path / "bare", BertModel(BertConfig(**ENCODER)), make_tokenizer())
    with pytest.raises(ValueError, match=r"lacks \d+ weights of a BertForMaskedLM, such as cls"):
        mdkern.from_pretrained(path)
    path = save(tmp_path / "classifier", BertForSequenceClassification(BertConfig(**ENCODER)), make_tokenizer())
    with pytest.raises(ValueError, match=r"lacks \d+ weights of a BertForMaskedLM"):
        mdkern.from_pretrained(path)


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=24, n_embd=16, n_layer=1, n_head=2))


NO_MASK = make_tokenizer(mask=None)
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "GPT-2": (gpt2, None, {}, "GPT2LMHeadModel.* is autoregressive: .* give mask_id"),
    "Llama": (llama, None, {"mask_token_id": None}, "LlamaForCausalLM.* is autoregressive"),
    "Llama with a mask token": (llama, make_tokenizer(), {"is_causal": None}, "looks to the left only"),
    "no mask": (bert, None, {"mask_token_id": None}, "has no mask token, neither in its config nor in its tokenizer"),
    "T5": (None, None, {"model_type": "t5", "is_encoder_decoder": True}, "is an encoder-decoder"),
    "ViT": (None, None, {"model_type": "vit", "architectures": ["ViTModel"]}, "is no language model that transformers"),
    "nothing known": (None, None, {"model_type": "new", "architectures": ["NewLM"]}, "is no language model that trans"),
    "DiffusionGemma": (None, None, {"architectures": ["DiffusionGemmaForBlockDiffusion"]}, r"mdkern\.sample_canvas"),
    "DUO": (None, None, {"model_type": "DUO"}, "uniformly random tokens and has no mask"),
    "BD3-LM": (None, None, {"model_type": "bd3lm"}, "sampled block by block"),
    "SEDD": (None, None, {"graph": {"type": "absorb"}}, "ratios of probabilities"),
    "D3PM": (
        None,
        None,
        {"model_type": "mdlm", "parameterization": "d3pm"},
        "its parameterization 'd3pm' is not MDLM's",
    ),
    "uniform noise": (bert, None, {"diffusion": "uniform"}, "its noise is 'uniform', not masking"),
    "scores": (bert, None, {"parameterization": "score"}, "ratios of probabilities"),
    "another tokenizer": (bert, make_tokenizer(words=40), {}, "has 40 ids, the model only 30: it belongs to another"),
    "another mask": (
        bert,
        make_tokenizer(),
        {"mask_token_id": 4},
        "has mask id 4, but its tokenizer has 27: give mask_id",
    ),
    "no such class": (bert, None, {"architectures": ["BertLMHeadModel"], "is_decoder": True}, "looks to the left only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_masked_diffusion_model_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    make, tokenizer, settings, message = REFUSED[case]
    path = save(tmp_path / "it", None if make is None else make(), tokenizer, **settings)
    with pytest.raises(ValueError, match=message):
        mdkern.from_pretrained(path)


def test_nothing_is_read_of_an_autoregressive_model(tmp_path: Path) -> None:
    path = save(tmp_path / "it", gpt2())
    (tmp_path / "it" / "model.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match="is autoregressive"):
        mdkern.from_pretrained(path)


def test_missing_and_broken_shards_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "it", bert(), make_tokenizer())
    file = tmp_path / "it" / "model.safetensors"
    weights = load_file(file)
    names = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    save_file(weights, tmp_path / "it" / "model-00001-of-00002.safetensors", {"format": "pt"})
    names[next(iter(names))] = "model-00002-of-00002.safetensors"
    (tmp_path / "it" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    file.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"lacks model-00002-of-00002\.safetensors, which model.safetensors.ind"
    ):
        mdkern.from_pretrained(path)
    (tmp_path / "it" / "model-00002-of-00002.safetensors").write_bytes(b"\x09\x00")
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is not a whole file of weights"):
        mdkern.from_pretrained(path)


def test_a_folder_inside_with_the_tokenizer_beside_it(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    make_tokenizer().save_pretrained(tmp_path / "all")
    save(tmp_path / "all" / "inner", bert())
    model = mdkern.from_pretrained(tmp_path / "all", subfolder="inner")
    assert (model.mask_id, len(model.tokenizer)) == (MASK, WORDS)


def test_an_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with pytest.raises(ValueError, match="is an adapter of owner/base: load that one"):
        mdkern.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int8"}, ValueError, "dtype must be 'auto' or a floating dtype"),
        ({"device_map": "cuda:77"}, ValueError, "device cuda:77 was asked for, but the GPUs"),
        ({"tokenizer": "/no/such"}, ValueError, "the tokenizer /no/such cannot be loaded: no tokenizer at /no/such"),
        (
            {"revision": "main"},
            ValueError,
            "revision is for names on the Hugging Face Hub, but .* is here: leave it out",
        ),
        ({"mask_id": 99}, ValueError, "mask_id must lie in 0..30"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    path = save(tmp_path / "it", bert(), make_tokenizer())
    with pytest.raises(error, match=message):
        mdkern.from_pretrained(path, **options)


def test_a_mistyped_path_is_no_request_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for name in ("runs/heavi", "./it", str(tmp_path / "x")):
        with pytest.raises(FileNotFoundError, match="no model at"):
            mdkern.from_pretrained(name)


def test_a_texts_length_is_bounded_by_the_models(tmp_path: Path) -> None:
    model = mdkern.from_pretrained(save(tmp_path / "it", bert(), make_tokenizer()))
    with pytest.raises(ValueError, match="length must be at most 24, the positions of"):
        mdkern.sample(model, length=25)


def test_models_of_two_vocabularies_do_not_go_together(tmp_path: Path) -> None:
    model = mdkern.from_pretrained(save(tmp_path / "it", bert(), make_tokenizer()))
    other = mdkern.from_pretrained(save(tmp_path / "other", bert(vocab_size=WORDS + 2), make_tokenizer()))
    with pytest.raises(
        ValueError, match="models must share their vocab_size: H has 30, L has 32: their tokenizers differ"
    ):
        mdkern.sample(model, other, "L1 H1", length=2)


def test_masks_and_ends_that_only_the_tokenizer_knows() -> None:
    assert mask_of(make_tokenizer()) == mask_of(make_tokenizer(mask=None)) == MASK
    assert mask_of(None) is None
    assert mask_of(make_tokenizer(mask=None, words=20)) is None
    assert end_of_turn(make_tokenizer()) == TURN
    assert end_of_turn(make_tokenizer(template=None)) is None
    assert end_of_turn(make_tokenizer(template="{{ messages[-1].content }} w2")) is None
    assert end_of_turn(make_tokenizer(template="{{ raise_exception('no') }}")) is None
