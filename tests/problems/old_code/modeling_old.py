"""Two small models that use transformers 4 as the code of LLaDA, Dream, SDAR and LLaDA 2 does."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import SlidingWindowCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import LossKwargs
from transformers.utils.import_utils import is_torch_fx_available

from .configuration_old import OldConfig

assert is_torch_fx_available()


class OldArguments(LossKwargs): ...


class OldGenerationConfig(GenerationConfig):
    def validate(self, is_init=False):
        pass


class OldRotary(nn.Module):
    def __init__(self, config, device=None):
        super().__init__()
        kind = "default" if config.rope_scaling is None else config.rope_scaling.get("rope_type", "default")
        inv_freq, self.scaling = ROPE_INIT_FUNCTIONS[kind](config, device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, position_ids):
        angle = position_ids[:, None, :, None].float() * self.inv_freq
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * self.scaling, angle.sin() * self.scaling


def turn(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class OldBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, is_causal=False)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class OldPreTrainedModel(PreTrainedModel):
    config_class = OldConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module):
        """In place, whatever has been read already."""
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()


class OldModel(OldPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = OldRotary(config)
        self.blocks = nn.ModuleList(OldBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids, position_ids=None, past_key_values=None):
        assert not isinstance(past_key_values, SlidingWindowCache)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        cos, sin = self.rotary(position_ids)
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return x


class OldWithPostInit(OldPreTrainedModel):
    """As Dream, SDAR and LLaDA 2: what is tied in a list, a generation config of its own."""

    _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = OldModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, name_or_path, *args, **kwargs):
        model = super().from_pretrained(name_or_path, *args, **kwargs)
        model.generation_config = OldGenerationConfig.from_pretrained(name_or_path)
        return model

    def get_input_embeddings(self):
        return self.model.embed

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, layer):
        self.lm_head = layer

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids, position_ids, past_key_values)))


class OldWithoutPostInit(OldWithPostInit):
    """As LLaDA: never finished by transformers, its `tie_weights` takes nothing, its config is asked for use_cache."""

    _tied_weights_keys = None

    def post_init(self):
        pass

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed.weight

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        assert not (self.config.use_cache if use_cache is None else use_cache)
        return super().forward(input_ids, attention_mask, position_ids, past_key_values)
