"""People's models, small and random: classes of transformers, and the interfaces of LLaDA's and Dream's code anew."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import mdkern
from mdkern import Denoiser, adapt
from mdkern.models.hf.split import SplitDenoiser

WORDS, MASK, LONGEST = 30, 27, 24
WIDTH, HEADS = 32, 4


def randomize(model: nn.Module, seed: int = 0) -> Any:
    """Weights with which every part of the model matters, and eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 and "emb" not in name and "wte" not in name else 1
            parameter.normal_(0.0, 0.5 * scale if parameter.ndim == 1 else 1.5 * scale, generator=generator)
            if parameter.ndim == 1 and "norm" in name:
                parameter += 1.0
    return model.eval()


class Config:
    """A bare configuration, as far as anybody asks."""

    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Output(NamedTuple):
    logits: Tensor
    past_key_values: Any = None


class IndexRotary(nn.Module):
    """LLaDA's: queries and keys of a sequence, the last keys' positions being those of the queries."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.arange(k.shape[-2], device=q.device)
        return self.turn(q, index[-q.shape[-2] :]), self.turn(k, index)

    @staticmethod
    def turn(x: Tensor, index: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = index[:, None] * 100.0 ** (-torch.arange(half, device=x.device) / half)
        cos, sin = (table.repeat(1, 2) for table in (angle.cos(), angle.sin()))
        return (x.float() * cos + torch.cat((-x[..., half:], x[..., :half]), -1).float() * sin).type_as(x)


class LLaDABlock(nn.Module):
    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.rotary_emb = IndexRotary()
        self.attn_norm, self.ff_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q_proj, self.attn_out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, kv_heads * WIDTH // HEADS, bias=False) for _ in range(2))
        self.ff_proj, self.up_proj = (nn.Linear(WIDTH, 32, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(32, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attn_norm(x)
        q, k, v = (
            layer(normed).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rotary_emb(q, k)
        k, v = (heads.repeat_interleave(HEADS // self.kv_heads, dim=1) for heads in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(2))
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))


class LLaDAModelLM(nn.Module):
    """Positions implied by the index; a table longer than the vocabulary; the attention mask read and not heeded."""

    def __init__(self, rows: int = WORDS + 2, layers: int = 2, kv_heads: int = HEADS, **changes: Any) -> None:
        super().__init__()
        settings: dict[str, Any] = {"weight_tying": False, "scale_logits": False, "n_kv_heads": kv_heads} | changes
        self.config = Config(
            model_type="llada", vocab_size=WORDS, embedding_size=rows, d_model=WIDTH, n_layers=layers, use_cache=False,
            mask_token_id=MASK, eos_token_id=3, max_sequence_length=LONGEST, **settings,
        )  # fmt: skip
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows, WIDTH),
                "blocks": nn.ModuleList(LLaDABlock(kv_heads) for _ in range(layers)),
                "ln_f": nn.RMSNorm(WIDTH),
            }
        )
        if not self.config.weight_tying:
            self.model.transformer["ff_out"] = nn.Linear(WIDTH, rows, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer["wte" if self.config.weight_tying else "ff_out"]

    def forward(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_bias: Tensor | None = None,
        past_key_values: list[tuple[Tensor, Tensor]] | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> Output:
        parts = self.model.transformer
        x = parts["wte"](input_ids)
        for block in parts["blocks"]:
            x = block(x)
        x = parts["ln_f"](x)
        logits = F.linear(x, parts["wte"].weight) if self.config.weight_tying else parts["ff_out"](x)
        if self.config.scale_logits:
            logits.mul_(1 / math.sqrt(self.config.d_model))
        return Output(logits)


class DreamConfig(Qwen2Config):
    model_type = "Dream"


def decoder_config(kind: type[PretrainedConfig], layers: int = 2, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": LONGEST,
        "mask_token_id": MASK, "eos_token_id": [3, 5], "pad_token_id": 1, "bos_token_id": 2, "is_causal": False,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    return kind(**(settings | changes))


def both_ways(model: nn.Module, seed: int = 0) -> Any:
    """A decoder of transformers, its attention in both directions."""
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return randomize(model, seed)


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    return both_ways(LlamaForCausalLM(decoder_config(LlamaConfig, **changes)), seed)


def qwen(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    return both_ways(Qwen2ForCausalLM(decoder_config(Qwen2Config, **changes)), seed)


class DreamModel(nn.Module):
    """Dream's outside around Qwen2's inside: `num_logits_to_keep`, masks that are four-dimensional or nothing."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        inside = qwen(layers=layers)
        self.config = decoder_config(DreamConfig, layers)
        self.model, self.lm_head = inside.model, inside.lm_head

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | str | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        num_logits_to_keep: int = 0,
    ) -> Output:
        if isinstance(attention_mask, Tensor) and attention_mask.ndim != 4:
            raise ValueError("the mask must be [B, 1, L, L]")
        mask = None if isinstance(attention_mask, str) else attention_mask
        run = self.model(input_ids, attention_mask=mask, position_ids=position_ids, use_cache=use_cache)
        return Output(self.lm_head(run[0][:, -num_logits_to_keep:, :]))


def dream(layers: int = 2) -> DreamModel:
    return DreamModel(layers).eval()


class BlockCausalModel(nn.Module):
    """The outside of models that see the blocks up to a position's own, around Qwen2's inside; `kind` is whose.

    SDAR must be given a mask, and asks whether it hides anything, as it then runs other attention. LLaDA 2 takes a
    square one with a head dimension and nothing else. Fast-dLLM v2 makes its own, and its logits are for the next
    position.
    """

    def __init__(self, kind: str, block_length: int = 4, layers: int = 2) -> None:
        super().__init__()
        inside = qwen(layers=layers)
        settings = {"sdar": "block_size", "Fast_dLLM_Qwen": "bd_size"}
        told = {settings[kind]: block_length} if kind in settings else {}
        self.config = Config(**(inside.config.to_dict() | {"model_type": kind} | told))
        self.model, self.lm_head, self.block_length = inside.model, inside.lm_head, block_length

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Output:
        batch, length = input_ids.shape
        if self.config.model_type == "Fast_dLLM_Qwen":
            attention_mask = self.blocks(batch, length)
        elif self.config.model_type == "llada2_moe" and attention_mask.size() != (batch, 1, length, length):
            raise ValueError("only square masks of blocks")
        elif torch.all(attention_mask):
            raise NotImplementedError("its kernel for masks that hide nothing is not installed")
        run = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)
        return Output(self.lm_head(run[0]))

    def blocks(self, batch: int, length: int) -> Tensor:
        block = torch.arange(length, device=self.lm_head.weight.device) // self.block_length
        return (block[:, None] >= block).expand(batch, 1, length, length)

    def own_logits(self, input_ids: Tensor) -> Tensor:
        """What its authors' code takes for the logits of each position."""
        logits = self.lm_head(self.model(input_ids, attention_mask=self.blocks(*input_ids.shape))[0])
        return torch.cat((logits[:, :1], logits[:, :-1]), 1) if self.config.model_type == "Fast_dLLM_Qwen" else logits


BLOCK_CAUSAL: dict[str, Callable[[], BlockCausalModel]] = {
    "SDAR": lambda: BlockCausalModel("sdar"),
    "LLaDA 2": lambda: BlockCausalModel("llada2_moe"),
    "Fast-dLLM v2": lambda: BlockCausalModel("Fast_dLLM_Qwen"),
}


def llada(seed: int = 0, **changes: Any) -> LLaDAModelLM:
    return randomize(LLaDAModelLM(**changes), seed)


ENCODER: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 32, "max_position_embeddings": LONGEST, "mask_token_id": MASK, "pad_token_id": 1,
}  # fmt: skip


def bert(**changes: Any) -> BertForMaskedLM:
    return randomize(BertForMaskedLM(BertConfig(**(ENCODER | changes))))


def roberta() -> RobertaForMaskedLM:
    return randomize(RobertaForMaskedLM(RobertaConfig(**ENCODER)))


def modern_bert() -> ModernBertForMaskedLM:
    special = {f"{name}_token_id": 2 for name in ("bos", "eos", "cls", "sep")}
    config = ModernBertConfig(**ENCODER, **special, local_attention=6, global_attn_every_n_layers=2)
    return randomize(ModernBertForMaskedLM(config))


MODELS: dict[str, Callable[[], Any]] = {
    "bert": bert,
    "roberta": roberta,
    "modern bert": modern_bert,
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "bert, eager attention": lambda: bert(attn_implementation="eager"),
    "qwen": qwen,
    "dream": dream,
    "llada": llada,
    "llada, tied and scaled": lambda: llada(weight_tying=True, scale_logits=True),
    "llada, grouped": lambda: llada(kv_heads=2),
}
CACHED = [name for name in MODELS if "eager" not in name and name not in ("roberta", "modern bert")]


def adapted(model: Any, **options: Any) -> Denoiser:
    """Split, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        denoiser = adapt(model, **options)
    assert isinstance(denoiser, SplitDenoiser)
    return denoiser


def by_logits(model: Any, shifted: bool = False) -> Denoiser:
    """The same model as somebody's function of ids."""

    def logits(input_ids: Tensor) -> Tensor:
        every = model(input_ids).logits[..., :WORDS]
        return torch.cat((every[:, :1], every[:, :-1]), dim=1) if shifted else every

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adapt(logits, vocab_size=WORDS, mask_id=MASK)


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Without the padding id, which RoBERTa counts no position for."""
    return torch.randint(2, MASK, (rows, length), generator=torch.Generator().manual_seed(seed))


def starts(rows: int, length: int = 12) -> Tensor:
    """Prompts of different lengths, then masks."""
    given = torch.arange(length) < 1 + torch.arange(rows)[:, None] % 4
    return torch.where(given, random_ids(rows, length), MASK)


def draw(model: Any, **options: Any) -> mdkern.SampleOutput:
    defaults: dict[str, Any] = {"input_ids": starts(5), "block_length": 4, "seed": 7, "batch_size": 3}
    return mdkern.sample(model, **(defaults | options))
