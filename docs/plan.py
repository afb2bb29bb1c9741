"""Draw docs/plan.png, the README's picture, from a run of the shipped pair: ``python docs/plan.py``."""

from pathlib import Path

from matplotlib.figure import Figure

import mdkern

COLOURS = {"H": "#1f4e9c", "L": "#e08a1e"}
NAMES = {"H": "heavy, 12 blocks", "L": "light, 4 blocks"}
LENGTH = STEPS = 64
SCHEDULE = "L16 H32 L16"

heavy, light, _ = mdkern.load_pair("cpu")
out = mdkern.sample(heavy, light, SCHEDULE, length=LENGTH, steps=STEPS, seed=4, return_history=True)
history, nfe = out.history, out.nfe
assert history is not None
assert nfe is not None
step, model = history.step[0], history.model[0]
figure = Figure(figsize=(9, 3.4))
axes = figure.add_subplot(xlabel="step (0: everything masked)", ylabel="position in the text")
for segment in mdkern.Schedule(SCHEDULE).segments():
    axes.axvspan(segment.first - 0.5, segment.stop - 0.5, color=COLOURS[segment.model], alpha=0.10, lw=0)
empty = sorted(set(range(STEPS)) - set(step.tolist()))
for number, skipped in enumerate(empty):
    label = f"{len(empty)} steps that reveal nothing: not run" if number == 0 else None
    axes.axvspan(skipped - 0.5, skipped + 0.5, color="#777777", alpha=0.35, lw=0, label=label)
for index, name in enumerate(history.models):
    chosen = model == index
    label = f"{NAMES[name]}: {int(nfe[name][0])} forward passes, {int(chosen.sum())} tokens"
    axes.scatter(step[chosen], chosen.nonzero()[:, 0], s=14, color=COLOURS[name], label=label, zorder=3)
axes.set_xlim(-0.5, STEPS - 0.5)
axes.set_ylim(LENGTH, -1)
figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
figure.savefig(Path(__file__).parent / "plan.png", dpi=140, bbox_inches="tight")
