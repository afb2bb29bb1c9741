"""``mdkern profile``: where the time goes, for the samplers people run today and for mdkern."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdkern.cli.common import check_plot, choose_device, load_model, positive

if TYPE_CHECKING:
    import torch

    from mdkern.models import DiT
    from mdkern.profiling.profile import Profile, Setting

PAPER_BLOCKS = (12, 4)
EPILOG = """\
Without a model: on a GPU, random weights of the paper's size with 12 and with 4 blocks, which
cost what trained ones do; on a CPU, the small pair that ships with mdkern.

examples:
  mdkern profile --device cpu --steps 4 --timed-steps 2
      2 x 64 tokens in 4 steps, cpu, 2 threads; seconds of a run
          model   sampler        backbone  head + sampling  everything else     total    timed
      12 blocks     eager   0.532 s 74.6%    0.181 s 25.4%        0 s  0.0%   0.713 s  2 steps
      ...
  mdkern profile --blocks 12 4 --output profile.png   random weights; also stacked bars
  mdkern profile --heavy big/ --light small/ --json   two checkpoints; JSON
"""


def add_profile(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "profile",
        help="show where the time goes",
        description="Time a run of three samplers (MDLM's as its code runs it, the same written for torch.compile, "
        "mdkern) and split it into backbone, head with sampling, and everything else.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_profile)
    models = parser.add_argument_group("models")
    models.add_argument("--heavy", metavar="PATH", help="checkpoint (ours or MDLM's layout)")
    models.add_argument("--light", metavar="PATH", help="checkpoint")
    models.add_argument(
        "--blocks", metavar="B", type=positive, nargs="+", help="instead: random weights of width 768, B blocks each"
    )
    models.add_argument("--vocab-size", metavar="V", type=positive, help="with --blocks (default: 50258)")
    models.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")

    run = parser.add_argument_group("the run that is timed")
    run.add_argument("--batch-size", metavar="B", type=positive, help="sequences (default: 16; on a CPU 2)")
    run.add_argument("--length", metavar="L", type=positive, help="in tokens (default: 1024; on a CPU 64)")
    run.add_argument("--steps", metavar="T", type=positive, help="(default: 1000; on a CPU 16)")
    run.add_argument(
        "--timed-steps",
        metavar="N",
        type=positive,
        default=20,
        help="of the baselines, whose run is extrapolated (default: 20)",
    )
    run.add_argument("--repeats", metavar="N", type=positive, default=3, help="runs of mdkern (default: 3)")

    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", type=Path, help="also draw stacked bars: .png, .svg or .pdf")
    output.add_argument("--json", action="store_true", help="JSON on standard output instead of a table")


def run_profile(arguments: argparse.Namespace) -> None:
    """Profile every model, print the table, draw the plot."""
    check_plot("--output", arguments.output)
    if arguments.blocks and (arguments.heavy or arguments.light):
        raise ValueError("--blocks is for random weights: it does not go with --heavy or --light")
    if arguments.vocab_size and (arguments.heavy or arguments.light or not arguments.blocks):
        raise ValueError("--vocab-size goes with --blocks")

    from mdkern.profiling.profile import plot, profile_model, table

    device = choose_device(arguments.device)
    models = choose_models(arguments, device)
    longest = min(model.config.max_length for model in models.values())
    setting = choose_setting(arguments, longest, device.type == "cuda")
    counts = {"timed_steps": arguments.timed_steps, "repeats": arguments.repeats}
    profiles: list[Profile] = []
    for name, model in models.items():
        for profile in profile_model(name, model, setting, **counts):
            print(f"{profile.model}, {profile.sampler}: {profile.total:.3g} s", file=sys.stderr)
            profiles.append(profile)
    title = f"{setting.batch_size} x {setting.length} tokens in {setting.steps} steps, {device_name(device)}"
    if arguments.json:
        print(json.dumps({"run": title, "profiles": [profile.as_dict() for profile in profiles]}, indent=1))
    else:
        print(f"{title}; seconds of a run\n\n{table(profiles)}")
    if arguments.output is not None:
        plot(profiles, arguments.output, title)


def choose_models(arguments: argparse.Namespace, device: torch.device) -> dict[str, DiT]:
    """Float32 models by their names in the table."""
    import torch

    from mdkern.pretrained import load_pair
    from mdkern.profiling.profile import PAPER_LENGTH, PAPER_VOCAB, random_dit

    paths = [path for path in (arguments.heavy, arguments.light) if path is not None]
    models: list[DiT]
    if paths:
        models = [load_dit(path, device) for path in paths]
    elif arguments.blocks or device.type == "cuda":
        length = max(PAPER_LENGTH, arguments.length or 0)
        vocab_size = arguments.vocab_size or PAPER_VOCAB
        blocks = arguments.blocks or PAPER_BLOCKS
        models = [random_dit(count, device, vocab_size=vocab_size, length=length) for count in blocks]
    else:
        models = list(load_pair(device, torch.float32)[:2])
    named = {f"{model.config.num_blocks} blocks": model for model in models}
    return named if len(named) == len(models) else {f"model {number}": model for number, model in enumerate(models, 1)}


def load_dit(path: str, device: torch.device) -> DiT:
    """The float32 `DiT` of that path, as the samplers that mdkern is compared with are written for nothing else."""
    import torch

    from mdkern.models import DiT

    model = getattr(load_model(path, path, torch.float32, device), "model", None)
    if not isinstance(model, DiT):
        raise ValueError(f"model {path} is a {type(model).__name__}: profile runs checkpoints of mdkern and MDLM only")
    return model


def choose_setting(arguments: argparse.Namespace, longest: int, on_gpu: bool) -> Setting:
    """What to run: the paper's setting on a GPU, a small one on a CPU, neither longer than the models."""
    from mdkern.profiling.profile import Setting

    usual = Setting() if on_gpu else Setting(batch_size=2, length=64, steps=16)
    return Setting(
        arguments.batch_size or usual.batch_size,
        arguments.length or min(longest, usual.length),
        arguments.steps or usual.steps,
    )


def device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
