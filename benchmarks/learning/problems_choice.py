"""A learned choice of positions for the word problems, whose answers are right or wrong: against `Threshold`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.learning.problems import ANSWER, END_ID, MASK_ID, prompts
from benchmarks.learning.setting import ANSWER_STREAM, Study, measure, write_answers
from mdkern import DiT
from mdkern.decoders import Learned, Policy, Threshold
from mdkern.models import adapt
from training.policy.fit import HIDDEN, fit_filter, report, split
from training.policy.states import States, collect

BOUNDS = (0.98, 0.95, 0.9, 0.8, 0.65, 0.5, 0.3)
STEPS, FEW_STEPS = 1500, 20


def compare_choices(study: Study, model: DiT) -> dict[str, Any]:
    """Filters fitted to the model's answers to problems of the training kind; then all rules on the same new ones."""
    size, denoiser = study.size, adapt(model)
    count = max(4, size.problems // 2)
    problems = study.problems(count, ANSWER_STREAM, held_out=False)
    ids = torch.from_numpy(np.concatenate((prompts(problems), np.full((count, ANSWER), MASK_ID)), 1))
    parts = []
    for number, rows in enumerate(ids.split(size.sample_batch)):
        first = size.sample_batch * number
        states, _ = collect(denoiser, rows.to(study.device), first, size.block_length, 0.0, study.seed, END_ID)
        parts.append(states)
    fitting, testing = split(States.join(parts), 0.25, count)
    facts: dict[str, Any] = {"bound": 0.5, "block_length": size.block_length, "vocab_size": denoiser.vocab_size}
    steps = STEPS if size.compiled else FEW_STEPS
    policies: dict[str, Policy] = {
        name: fit_filter(fitting, hidden, study.seed, steps, **facts)
        for name, hidden in (("linear", None), ("mlp", HIDDEN))
    }
    test = study.test_problems()
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, bounds in (("threshold", size.thresholds), ("linear", BOUNDS), ("mlp", BOUNDS)):
        curves[name] = []
        for bound in bounds:
            decoder = Learned(policies[name], bound) if name in policies else Threshold(bound)
            curves[name].append({"bound": bound} | measure(study, test, write_answers(study, model, test, decoder)))
    return {"offline": report(testing, policies), "curves": curves}
