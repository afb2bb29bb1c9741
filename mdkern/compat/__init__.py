"""The generation functions of LLaDA, Dream and Fast-dLLM, by the names and defaults that their scripts use.

A script changes one import and runs on mdkern: `mdkern.compat.llada`, `mdkern.compat.dream`, `mdkern.compat.fast_dllm`.
With a temperature of 0 they write the tokens that the authors' own loops write; otherwise they draw from the same
distributions. What their names mean to `mdkern.sample`:

=================== ==================================================================================================
LLaDA               `mdkern.sample`
=================== ==================================================================================================
gen_length (128)    that many masks after the prompt
steps (128)         ``steps``, of all blocks together
block_length (128)  ``block_length``
temperature (0)     ``temperature``
cfg_scale (0)       ``guidance_scale``
remasking           ``"low_confidence"``: ``decoders.TopProbability()``; ``"random"``: ``decoders.RandomRemask()``
logits_eos_inf      a logits processor that forbids the end of text
=================== ==================================================================================================

=================== ==================================================================================================
Fast-dLLM           as LLaDA's, and
=================== ==================================================================================================
threshold (None)    ``decoders.Threshold(threshold)``; the number of steps then follows from the text
factor (None)       ``decoders.Factor(factor, rule="code")``; likewise
..._prefix_cache    ``cache="prefix"``
..._dual_cache      ``cache="dual"``
=================== ==================================================================================================

=================== ==================================================================================================
Dream               `mdkern.sample`
=================== ==================================================================================================
max_new_tokens      that many masks after the prompt; or ``max_length``, prompt included (prompt + 20)
steps (512)         ``steps``
temperature (0)     ``temperature``; ``top_p``, ``top_k`` as they are, but not both
alg ("origin")      ``decoders.Ancestral(eps, closing_pass=False)``
"maskgit_plus"      ``decoders.TopProbability(alg_temp, quota=DreamQuota(eps, 0), of="sampler")``
"topk_margin"       ``decoders.Margin(...)`` likewise
"entropy"           ``decoders.Entropy(...)`` likewise
alg_temp (None)     ``position_temperature``
eps (0.001)         the last time
=================== ==================================================================================================

Dream's quotas are those of a batch's mean in its own code and those of each text here, which is the same where all
texts have equally many masks. Every function passes further keyword arguments on to `mdkern.sample`, such as ``seed``,
``batch_size``, ``stop_at_eos`` or ``streamer``. An argument that could have no effect is refused.
"""
