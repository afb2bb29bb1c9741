"""The generation functions of LLaDA, Dream and Fast-dLLM, by the names and defaults that their scripts use.

A script changes one import and runs on mdkern: `mdkern.compat.llada`, `mdkern.compat.dream`, `mdkern.compat.fast_dllm`.
With a temperature of 0 they write the tokens that the authors' own loops write; otherwise they draw from the same
distributions. What their names mean to `mdkern.sample`, with the published defaults:

| LLaDA | `mdkern.sample` |
| --- | --- |
| `gen_length=128` | that many masks after the prompt |
| `steps=128` | `steps`, of all blocks together |
| `block_length=128` | `block_length` |
| `temperature=0` | `temperature` |
| `cfg_scale=0` | `guidance_scale` |
| `remasking="low_confidence"` | `decoders.TopProbability()` |
| `remasking="random"` | `decoders.RandomRemask()` |
| `logits_eos_inf=False` | True: a logits processor that forbids the end of text |
| `confidence_eos_eot_inf=False` | True is refused |

| Fast-dLLM | as LLaDA's, and |
| --- | --- |
| `threshold=None` | `decoders.Threshold(threshold)`; the number of steps then follows from the text |
| `factor=None` | `decoders.Factor(factor, rule="code")`; likewise |
| `generate_with_prefix_cache` | `cache="prefix"` |
| `generate_with_dual_cache` | `cache="dual"` |

| Dream | `mdkern.sample` |
| --- | --- |
| `max_new_tokens=None` | that many masks after the prompt; or `max_length`, prompt included (20 more than the prompt) |
| `steps=512` | `steps` |
| `temperature=0` | `temperature` |
| `top_p=None`, `top_k=None` | the same, but not both |
| `alg="origin"`, `eps=0.001` | `decoders.Ancestral(eps, closing_pass=False)` |
| `alg="maskgit_plus"`, `alg_temp=None` | `decoders.TopProbability(alg_temp, quota=DreamQuota(eps, 0), of="sampler")` |
| `alg="topk_margin"` | `decoders.Margin(...)` likewise |
| `alg="entropy"` | `decoders.Entropy(...)` likewise |
| `alg="confidence_threshold"`, `threshold=0.9` | Fast-dLLM's, `decoders.threshold.PacedThreshold(threshold)` |
| `block_length=None`, `dual_cache=False` | Fast-dLLM's: `cache="prefix"` or `"dual"`, `decoders.block_start` |

Dream's quotas are those of a batch's mean in its own code and those of each text here, which is the same where all
texts have equally many masks. Every function passes further keyword arguments on to `mdkern.sample`, such as `seed`,
`batch_size`, `stop_at_eos` or `streamer`. An argument that could have no effect is refused.
"""

__all__: list[str] = []
