"""``mdkern chat``: a conversation in the terminal, with the tokens of an answer appearing as they are revealed."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mdkern.cli.common import add_models, load_models, one_line, positive, unicode_text
from mdkern.cli.decoder import add_decoding, parse_decoder, sample_options
from mdkern.cli.drafts import Display, Drafted
from mdkern.cli.prompt import choose_schedule

if TYPE_CHECKING:
    from mdkern.decoders import Decoder
    from mdkern.models import Denoiser
    from mdkern.schedule import Schedule

BLOCK = 32  # positions of a block, where the model has none of its own, as in Fast-dLLM
HELP = "/new begins a new conversation, /quit ends, Ctrl-C stops an answer"


def add_chat(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk with an instruct model",
        description="Talk with a model that has a chat template. Tokens appear as they are revealed, in any order. "
        f"In the conversation {HELP}. From a pipe each line is a turn.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_chat)
    add_models(parser, "An instruct model, by --model PATH, or several under a schedule.")
    group = parser.add_argument_group("what to write")
    group.add_argument("--system", metavar="TEXT", type=unicode_text, help="what the conversation begins with")
    group.add_argument("--new-tokens", metavar="N", type=positive, default=128, help="most of an answer (default: 128)")
    group.add_argument("--steps", metavar="T", type=positive, help="(default: as many as tokens)")
    group.add_argument("--schedule", metavar="TEXT", type=unicode_text, help="as in mdkern sample")
    group.add_argument("--temperature", metavar="X", type=float, default=0.0, help="(default: 0, the most probable)")
    group.add_argument("--seed", metavar="S", type=int, help="of the first answer; the next ones count up from it")
    add_decoding(parser, decoder="threshold", blocks=f"{BLOCK}, or the model's own", stops=False)


class Conversation:
    """What has been said, and how the next answer is written."""

    def __init__(
        self,
        models: dict[str, Denoiser],
        tokenizer: Any,
        schedule: Schedule,
        decoder: Decoder,
        system: str | None,
        new_tokens: int,
        options: dict[str, Any],
        seed: int,
    ) -> None:
        """
        Args:
            new_tokens: most tokens of an answer.
            options: further arguments of `mdkern.sample`.
            seed: of the first answer.
        """
        self.models, self.tokenizer, self.schedule, self.decoder = models, tokenizer, schedule, decoder
        self.system, self.new_tokens, self.options, self.seed = system, new_tokens, options, seed
        self.begin()

    def begin(self) -> None:
        """Forget what has been said."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(self, question: str, display: Display) -> str:
        """The answer to a question. Both are kept if it is finished; an exception leaves the conversation as it was.

        Raises:
            ValueError: the conversation has become too long, or its template refuses it.
        """
        from mdkern.models.tokenizers import chat_text
        from mdkern.sampling import sample

        messages = [*self.messages, {"role": "user", "content": question}]
        ids = self.prompt_ids(chat_text(self.tokenizer, messages))
        prompt = ids.shape[1] - self.new_tokens
        first = next(iter(self.models.values()))
        drafts = Drafted(display, self.tokenizer, prompt, first.mask_id, first.eos_ids)
        out = sample(
            self.models,
            self.schedule,
            input_ids=ids,
            decoder=self.decoder,
            seed=self.seed,
            streamer=drafts,
            progress=False,
            **self.options,
        )
        (text,) = out.decode(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": text.strip()}]
        self.seed += 1
        return text.strip()

    def prompt_ids(self, text: str) -> Any:
        """The text's tokens and masks for the answer, int64 ``[1, L]``."""
        import torch

        first = next(iter(self.models.values()))
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        limits = [model.max_length for model in self.models.values() if model.max_length is not None]
        if limits and len(ids) + self.new_tokens > min(limits):
            raise ValueError(
                f"the conversation has {len(ids)} tokens, with which {self.new_tokens} more do not fit the"
                f" {min(limits)} positions of the model: begin anew with /new, or give fewer --new-tokens"
            )
        return torch.tensor([ids + [first.mask_id] * self.new_tokens], device=first.device)


def run_chat(arguments: argparse.Namespace) -> None:
    from mdkern.engine.resolve import resolve_seed
    from mdkern.models.tokenizers import chat_text

    if arguments.heavy is None and arguments.light is None and not arguments.model:
        raise ValueError(
            "give an instruct model: mdkern chat --model PATH. The small pair that ships with mdkern continues texts"
            " only: mdkern sample --prompt"
        )
    make_decoder = parse_decoder(arguments.decoder)
    models, tokenizer = load_models(arguments)
    chat_text(tokenizer, [{"role": "user", "content": "?"}])  # refuses a tokenizer without a template
    first = next(iter(models.values()))
    schedule = choose_schedule(arguments.schedule, tuple(models))
    options = sample_options(arguments) | {"temperature": arguments.temperature, "steps": arguments.steps}
    if options["block_length"] is None and first.block_causal is None:
        options["block_length"] = min(BLOCK, arguments.new_tokens)
    conversation = Conversation(
        models,
        tokenizer,
        schedule,
        make_decoder(tokenizer, first.vocab_size),
        arguments.system,
        arguments.new_tokens,
        options,
        resolve_seed(arguments.seed, None),
    )
    talk(conversation, Display(sys.stdout), sys.stdin.isatty())


def talk(conversation: Conversation, display: Display, asks: bool) -> None:
    """Read questions and write answers until the input ends.

    Args:
        asks: whether somebody is there to be asked. Otherwise an error or an interrupt ends it.
    """
    if asks:
        with suppress(ImportError):  # not on every system
            import readline  # noqa: F401 - lets `input` edit lines and recall them
        names = ", ".join(model.name for model in conversation.models.values())
        print(f"{names}: {HELP}", file=sys.stderr)
    while (question := next_question(asks)) is not None:
        if question == "/new":
            conversation.begin()
            continue
        if not question:
            continue
        try:
            display.finish(conversation.answer(question, display))
        except KeyboardInterrupt:
            display.clear()
            if not asks:
                raise
            print("mdkern: stopped, the question is forgotten", file=sys.stderr)
        except (ValueError, FloatingPointError) as error:
            display.clear()
            if not asks:
                raise
            print(f"mdkern: {one_line(error)}", file=sys.stderr)


def next_question(asks: bool) -> str | None:
    """The next line of the input; None at its end, at /quit, or when Ctrl-C is pressed instead of a question."""
    try:
        line = input("> ") if asks else sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None
    if not asks and not line:
        return None
    line = line.strip()
    return None if line == "/quit" else line
