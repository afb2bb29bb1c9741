"""``mdkern sample``'s options that say which positions are revealed, and which tokens may be drawn."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdkern.cli.common import one_line, positive

if TYPE_CHECKING:
    from mdkern.decoders import Decoder

SAMPLE_OPTIONS = ("block_length", "steps_per_block", "cache", "stop_at_eos", "top_k", "top_p", "top_p_rule", "min_p",
                  "batch_invariant", "cuda_graphs")  # fmt: skip
REFERENCE_TEXT = "frequency"  # the parameter that is computed from a text, whose file the option names
EXAMPLES = {
    REFERENCE_TEXT: "reference.txt",
    "exponents": "2",
    "policy": "runs/policy/mlp",
}  # examples of values for parameters without a default
EXPLAINED = {
    REFERENCE_TEXT: "the tokens' frequencies are counted in that text",
    "policy": "it is a folder that python -m training.policy wrote",
    "exponents": "it may be a number, a list such as [2,1,0.5], or a file of numbers, one per position",
}


def add_decoding(
    parser: argparse.ArgumentParser, decoder: str = "ancestral", blocks: str = "none", stops: bool = True
) -> None:
    """The options of `sample_options` and the decoder.

    Args:
        decoder: the default.
        blocks: what the help says about the default of the block length.
        stops: whether --stop-at-eos is an option; otherwise texts always end so.
    """
    group = parser.add_argument_group("how it is written")
    group.add_argument(
        "--decoder",
        metavar="NAME[:KEY=VALUE,...]",
        default=decoder,
        help="which positions are revealed at a step, e.g. threshold:threshold=0.9 or remdm:kind=cap,eta=0.01; a "
        "wrong name is answered with all that there are. position_aware:frequency=FILE takes the tokens' frequencies "
        "from a text file, genmd4:exponents=FILE numbers, which may also be given as in genmd4:exponents=[2,1,0.5] "
        f"(default: {decoder})",
    )
    group.add_argument(
        "--block-length",
        metavar="N",
        type=positive,
        help=f"reveal in blocks of N from left to right (default: {blocks})",
    )
    group.add_argument("--steps-per-block", metavar="T", type=positive, help="steps for each block, instead of --steps")
    group.add_argument(
        "--cache",
        choices=["none", "prefix", "dual", "block"],
        default="none",
        help="with --block-length, keep keys and values of what is before the block (prefix), or of all around it "
        "(dual): faster and approximate. With a block-causal model keep those of finished blocks (block): faster and "
        "exact (default: none)",
    )
    if stops:
        group.add_argument(
            "--stop-at-eos", action="store_true", help="end a text with the first end of text, which is not printed"
        )
    else:
        parser.set_defaults(stop_at_eos=True)
    group.add_argument("--top-k", metavar="K", type=int, default=0, help="draw among the K most probable tokens only")
    group.add_argument("--top-p", metavar="P", type=float, default=1.0, help="among the fewest that sum to P only")
    group.add_argument(
        "--top-p-rule",
        choices=["reach", "within"],
        default="reach",
        help="whether the token that crosses P is among them, or not, as in ReMDM's code (default: reach)",
    )
    group.add_argument(
        "--min-p", metavar="P", type=float, default=0.0, help="among those P times as probable as the first only"
    )
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="on a GPU, the same bits for every text whatever the batch size and the other texts, somewhat slower",
    )
    group.add_argument(
        "--no-cuda-graphs",
        dest="cuda_graphs",
        action="store_false",
        help="run every pass from Python, as it may be for debugging",
    )


def sample_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as arguments of `mdkern.sample`, without the decoder."""
    return {name: getattr(arguments, name) for name in SAMPLE_OPTIONS}


def parse_decoder(text: str) -> Callable[[Any, int], Decoder]:
    """The decoder that a text describes, as a function of the tokenizer and its number of ids.

    Everything that does not depend on these is checked at once.

    Raises:
        ValueError: an unknown name or parameter, or a value that cannot be right.
    """
    from mdkern.decoders import DECODERS, by_name

    name, _, rest = text.partition(":")
    if name not in DECODERS:
        by_name(name)  # raises the error that lists all names
    kind = DECODERS[name]
    parameters = {field.name: field for field in fields(kind)}
    options = parse_options(text, name, rest, list(parameters))
    needed = [key for key, field in parameters.items() if field.default is MISSING and field.default_factory is MISSING]
    missing = [key for key in needed if key not in options]
    if missing:
        wanted = ",".join(f"{key}={EXAMPLES.get(key, 'VALUE')}" for key in missing)
        explained = "".join(f"; {EXPLAINED[key]}" for key in missing if key in EXPLAINED)
        raise ValueError(f"--decoder {text}: {name} needs {', '.join(missing)}, as in {name}:{wanted}{explained}")
    for key, value in options.items():
        takes_numbers = "Tensor" in str(parameters[key].type) and key != REFERENCE_TEXT
        if takes_numbers and isinstance(value, str):
            options[key] = numbers_of(text, value, read_text(text, Path(value)))
    if isinstance(options.get(REFERENCE_TEXT), str):
        return with_frequencies(text, kind, options)
    decoder = build(text, kind, **options)
    return lambda tokenizer, vocab_size: decoder


def parse_options(text: str, name: str, rest: str, known: list[str]) -> dict[str, Any]:
    """A decoder's parameters from ``KEY=VALUE,KEY=VALUE``."""
    options: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", rest) if rest else []:  # commas outside of brackets
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise ValueError(f"--decoder {text}: {part!r} must be KEY=VALUE, as in threshold:threshold=0.9")
        if key not in known:
            there_is = f"there is {', '.join(known)}" if known else "it has none"
            raise ValueError(f"--decoder {text}: {name} has no parameter {key!r}, {there_is}")
        if key in options:
            raise ValueError(f"--decoder {text}: {key} is given twice")
        options[key] = literal(text, value)
    return options


def literal(decoder: str, text: str) -> Any:
    """A whole number, a number, a list of numbers in brackets, true, false, or else the text itself.

    The decoders refuse values that they cannot use.
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.startswith("["):
        return numbers_of(decoder, text, text[1:].removesuffix("]"))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def numbers_of(decoder: str, where: str, text: str) -> list[float]:
    """The numbers in a text, between which there is white space or a comma."""
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise ValueError(f"--decoder {decoder}: {where} must hold numbers: {one_line(error)}") from None


def read_text(decoder: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"--decoder {decoder}: {path} cannot be read: {one_line(error)}") from error


def build(text: str, make: Callable[..., Any], *arguments: Any, **options: Any) -> Decoder:
    try:
        decoder: Decoder = make(*arguments, **options)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"--decoder {text}: {one_line(error)}") from error
    return decoder


def with_frequencies(text: str, kind: type[Any], options: dict[str, Any]) -> Callable[[Any, int], Decoder]:
    """A decoder that needs the tokens' frequencies, which are counted in the file that the option names."""
    import torch

    from mdkern.decoders import reference_frequencies

    path = Path(str(options.pop(REFERENCE_TEXT)))
    build(text, kind, torch.ones(1), **options)  # checks the other parameters
    content = read_text(text, path)

    def make(tokenizer: Any, vocab_size: int) -> Decoder:
        ids = torch.tensor(tokenizer.encode(content, add_special_tokens=False), dtype=torch.int64)
        return build(text, lambda: kind(reference_frequencies(ids, vocab_size), **options))

    return make
