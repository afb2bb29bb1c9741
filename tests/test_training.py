"""The training loop: data round trips, the loss as an estimator, exact resumption, atomic files, refused arguments."""

from __future__ import annotations

import argparse
import json
import logging
import lzma
import math
import os
import signal
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mdkern.cli import main as cli
from mdkern.evaluation.text import judge as score
from mdkern.models import DiT, DiTConfig, load_dit
from training import checkpoint, data, judge, loop, options, sizes, train
from training.batches import MaskedBatches, Prefetched, masked_batch, step_generator, stratified_times
from training.evaluate import held_out_nelbo, weighted_losses
from training.loop import Objective, World
from training.optim import Muon, lr_schedule, make_optimizers

ROOT = Path(__file__).parents[1]
VOCAB, MASK = 128, 127
CPU = World(0, 1, torch.device("cpu"))
TINY = {"blocks": 1, "width": 16, "heads": 2, "length": 16, "batch-size": 8, "warmup": 10, "lr": 1e-2, "workers": 1}


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, whatever process they run in."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_tokens(path: Path, tokens: np.ndarray, tokenizer: str = "t") -> Path:
    tokens.astype(np.uint16).tofile(path)
    digest = data.hashlib.sha256(path.read_bytes()).hexdigest()
    data.write_info(path, data.TokenFileInfo("uint16", len(tokens), VOCAB, 0, MASK, tokenizer, digest, len(tokens), []))
    return path


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Markov chain: the next token is the last plus 1, 2 or 3, modulo 31."""
    steps = np.random.default_rng(0).integers(1, 4, 20_000)
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.bin", np.cumsum(steps) % 31)


def arguments(token_file: Path, out: Path, steps: int, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {"data": token_file, "valid": token_file, "out": out, "eval-samples": 16}
    settings |= TINY | {"tokens": steps * 8 * 16, "device": "cpu"}
    settings |= {key.replace("_", "-"): value for key, value in changes.items()}
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def losses(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def child_environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | more


def toy_denoiser(seed: int = 0, **changes: Any) -> DiT:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"vocab_size": 5, "mask_id": 4, "max_length": 8, "num_blocks": 1, "width": 8}
    model = DiT(DiTConfig(**(settings | {"num_heads": 1, "tie_head": True} | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if changes.get("tie_head", True):
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


# ------------------------------------------------------------------------------------------------------------ data

TEXT = [["A  tale  of two", " cities é 漢字 🙂", "", "\tIt was <|mask|> the\r best."], ["x <|endoftext|> y", "last "]]


def write_text(path: Path, documents: list[list[str]]) -> str:
    text = "".join("\n".join(document) + "\n<|endoftext|>\n" for document in documents)
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "wb") as file:
        file.write(text.encode())
    return str(path)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    source = write_text(
        folder / "text.txt", [["the cat sat on the mat", "it was the best of times, the worst of them"] * 20]
    )
    data.main(["bpe", "--vocab-size", "280", "--out", str(folder), source])
    return folder


@pytest.mark.parametrize("suffix", [".txt", ".txt.xz"])
def test_tokenising_and_decoding_gives_the_text_back(tmp_path, tokenizer_folder, suffix):
    from transformers import PreTrainedTokenizerFast

    first, second = write_text(tmp_path / f"a{suffix}", TEXT), write_text(tmp_path / f"b{suffix}", TEXT[:1])
    data.main(["tokenize", "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "t.bin"), first, second])
    tokens, info = data.open_tokens(tmp_path / "t.bin")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id, len(tokenizer)) == (0, 279, 280)
    assert (info.eos_id, info.mask_id, info.vocab_size, info.count) == (0, 279, 280, len(tokens))
    assert not (tokens == 279).any()  # a text that names the mask does not hold it
    assert tokens[-1] == 0
    documents = np.split(tokens, np.flatnonzero(tokens == 0) + 1)[:-1]
    decoded = [tokenizer.decode(document[:-1].tolist()) for document in documents]
    assert decoded == ["\n".join(document) for document in [*TEXT, TEXT[0]]]
    assert info.text_bytes == sum(len(text.encode()) for text in decoded)


def test_a_failed_tokenisation_leaves_no_file(tmp_path, tokenizer_folder):
    good = write_text(tmp_path / "a.txt", TEXT)
    with pytest.raises(FileNotFoundError, match="no such text file"):
        data.tokenize([good, str(tmp_path / "missing.txt")], tokenizer_folder, tmp_path / "out" / "t.bin")
    assert list((tmp_path / "out").iterdir()) == []


def test_data_sets_need_the_train_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"mdkern\[train\]"):
        next(data.paragraphs("openwebtext"))


def test_pack_and_unpack_are_inverse_and_notice_damage(tmp_path, token_file):
    packed = data.pack(token_file, tmp_path / "packed")
    path = data.unpack(packed, tmp_path / "data")
    assert path.read_bytes() == token_file.read_bytes()
    assert data.read_info(path) == data.read_info(token_file)
    packed.write_bytes(lzma.compress(b"other"))
    with pytest.raises(ValueError, match="damaged"):
        data.unpack(packed, tmp_path / "again")
    assert not (tmp_path / "again" / path.name).exists()


# --------------------------------------------------------------------------------------------------------- batches


def test_times_have_discrepancy_below_one_over_their_number():
    for count, step in product((1, 7, 64), range(20)):
        t = np.sort((stratified_times(count, 0.0, step_generator(3, step)) - 0.0).astype(np.float64))
        rank = np.arange(count)
        star_discrepancy = max((t - rank / count).max(), ((rank + 1) / count - t).max())
        assert star_discrepancy <= 1 / count + 1e-6
    first = [stratified_times(4, 0.1, step_generator(3, step))[0] for step in range(2000)]
    assert abs(np.mean(first) - 0.55) < 4 * 0.9 / math.sqrt(12 * 2000)  # each time alone is uniform on [eps, 1]
    assert min(first) >= 0.1
    assert max(first) <= 1.0


def batches_of(token_file: Path, **changes: Any) -> MaskedBatches:
    tokens, info = data.open_tokens(token_file)
    return MaskedBatches(
        **({"tokens": tokens, "batch_size": 8, "length": 16, "mask_id": info.mask_id, "seed": 5} | changes)
    )


def test_a_batch_is_a_function_of_seed_and_step_only(token_file):
    ahead = batches_of(token_file)
    for step in (9, 2, 4):
        ahead(step)
    for mine, other in zip(ahead(3)[0], batches_of(token_file)(3)[0]):
        assert torch.equal(mine, other)
    assert not torch.equal(ahead(3)[0].input_ids, ahead(4)[0].input_ids)
    assert not torch.equal(ahead(3)[0].input_ids, batches_of(token_file, seed=6)(3)[0].input_ids)


def test_shards_make_up_the_global_batch_and_are_stratified(token_file):
    whole = batches_of(token_file)(7)[0]
    parts = [part for rank in range(2) for part in batches_of(token_file, rank=rank, world=2, accumulate=2)(7)]
    for k, part in enumerate(parts):
        assert torch.equal(part.input_ids, whole.input_ids[k::4])
        assert torch.equal(part.t, whole.t[k::4])
        assert part.t.max() - part.t.min() > 0.49  # two times half a period apart
    assert sum(float(part.weights.sum()) for part in parts) == pytest.approx(float(whole.weights.sum()))


def test_rows_targets_and_weights_describe_the_masked_positions():
    windows = np.random.default_rng(1).integers(0, MASK, (64, 32))
    t = stratified_times(64, 1e-3, step_generator(0, 0))
    uniforms = step_generator(0, 1).random((64, 32), dtype=np.float32)
    batch = masked_batch(windows, t, uniforms, MASK)
    count = int((batch.weights > 0).sum())
    rows = batch.row_index[:count].numpy()
    restored = batch.input_ids.numpy().reshape(-1).copy()
    assert (np.flatnonzero(restored == MASK) == rows).all()
    restored[rows] = batch.targets[:count].numpy()
    assert (restored.reshape(64, 32) == windows).all()
    np.testing.assert_allclose(batch.weights[:count].numpy(), 1 / t[rows // 32])
    assert (batch.weights[count:] == 0).all()
    shares = (batch.input_ids == MASK).double().mean(1).numpy()
    assert abs((shares - t) / np.sqrt(t * (1 - t) / 32 + 1e-9)).mean() < 1.2  # standard normal: 0.8


def test_prefetching_keeps_order_and_passes_errors_on():
    def make(step: int) -> list[tuple[torch.Tensor, ...]]:
        if step == 30:
            raise OSError("disk")
        return [(torch.tensor(step),)]

    assert [int(batch[0][0]) for batch in Prefetched(make, 3, 29, workers=3, ahead=4)] == list(range(3, 29))
    with pytest.raises(OSError, match="disk"):
        list(Prefetched(make, 25, 40))


# ------------------------------------------------------------------------------------------------------------ loss


@pytest.mark.parametrize("block_causal", [None, 2])
def test_the_loss_is_an_unbiased_estimate_of_the_bound(block_causal):
    """Against the integral over t of the sum over all masks, on three tokens of a vocabulary of four.

    Of a block-causal model it is the sum of the blocks' bounds, each given the tokens before it.
    """
    length, eps = 3, 0.05
    model = toy_denoiser(block_causal=block_causal).eval()
    window = torch.tensor([2, 0, 3])
    nodes, node_weights = np.polynomial.legendre.leggauss(20)
    times, node_weights = eps + (1 - eps) * (nodes + 1) / 2, node_weights / 2  # the mean over [eps, 1]
    exact = 0.0
    for block in range(0, length, block_causal or length):
        end = min(block + (block_causal or length), length)
        for mask in product((False, True), repeat=end - block):
            masked = torch.tensor((False,) * block + mask)
            with torch.no_grad():
                logits = model(window[:end].masked_fill(masked, 4)[None])[0]
            nll = float((F.cross_entropy(logits, window[:end], reduction="none") * masked).sum())
            count = sum(mask)
            if count:
                probability = times**count * (1 - times) ** (len(mask) - count)
                exact += float((node_weights * probability / times).sum()) * nll / length
    batch_size = 64
    objective = Objective(model, weighted_losses, 1 / (batch_size * length))
    windows = window.numpy()[None].repeat(batch_size, 0)
    estimates = []
    for step in range(1000):
        generator = step_generator(1, step)
        t = stratified_times(batch_size, eps, generator)
        batch = masked_batch(windows, t, generator.random((batch_size, length), dtype=np.float32), 4)
        with torch.no_grad():
            estimates.append(float(objective(*batch)))
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert error < 0.01 * exact
    assert abs(np.mean(estimates) - exact) < 4 * error


def test_an_untrained_head_costs_the_log_of_the_vocabulary(token_file):
    model = toy_denoiser(vocab_size=VOCAB, mask_id=MASK, max_length=16, tie_head=False)
    tokens, _ = data.open_tokens(token_file)
    result = held_out_nelbo(model, tokens, 16, 2048, 128, CPU)
    uniform = math.log(VOCAB - 1)  # the mask cannot be predicted
    assert [part["cross_entropy"] for part in result["by_t"]] == pytest.approx([uniform] * 10, rel=1e-5)
    assert abs(result["nelbo_nats_per_token"] - uniform) < 4 * result["standard_error"]
    assert result["standard_error"] < 0.05 * uniform
    mean_of_bins = np.mean([part["nelbo"] for part in result["by_t"]])
    assert mean_of_bins == pytest.approx(result["nelbo_nats_per_token"], rel=0.05)


def test_time_conditioning_reaches_the_model(token_file):
    model = toy_denoiser(vocab_size=VOCAB, mask_id=MASK, max_length=16, time_conditioning=True)
    batch = batches_of(token_file)(0)[0]
    objective = Objective(model, weighted_losses, 1.0)
    assert not torch.equal(objective(*batch), objective(*batch._replace(t=batch.t.flip(0))))


# ------------------------------------------------------------------------------------------------------- optimiser


def test_muon_takes_the_steps_of_pytorchs_muon():
    torch.manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (8, 8)]
    ours = [torch.randn(shape) for shape in shapes]
    theirs = [parameter.clone() for parameter in ours]
    mine = Muon(ours, lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        mine.step()
        reference.step()
    for one, other in zip(ours, theirs):  # the iteration is in bfloat16: a step of rms 0.004 is off by up to 2 %
        assert (one - other).abs().max() < 5 * 0.02 * 0.2 * 8**0.5 * 0.02


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = toy_denoiser(time_conditioning=True)
    adamw, muon = make_optimizers(model, "muon", 1e-3, 1e-2, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert in_muon == {f"blocks.0.{n}.weight" for n in ("attn_qkv", "attn_out", "mlp_up", "mlp_down")}
    in_adamw = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert sorted([*in_muon, *in_adamw]) == sorted(names.values())


def test_the_learning_rate_warms_up_and_falls_to_its_floor():
    fraction = lr_schedule("cosine", 10, 110, 0.1)
    assert [fraction(step) for step in (0, 9, 60, 110, 500)] == pytest.approx([0.1, 1.0, 0.55, 0.1, 0.1])
    assert lr_schedule("constant", 0, 10)(7) == 1.0


# ------------------------------------------------------------------------------------------- runs and their pieces

STEPS = 120


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, token_file: Path) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("unbroken")
    assert train.main(arguments(token_file, out, STEPS, optimizer="muon", schedule="cosine")) == 0
    return out


def assert_same_run(out: Path, unbroken: Path) -> None:
    assert losses(out) == losses(unbroken)
    ours, whole = (load_dit(folder / "final").state_dict() for folder in (out, unbroken))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert json.loads((out / "eval.json").read_text()) == json.loads((unbroken / "eval.json").read_text())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.slow
def test_training_learns(tmp_path, optimizer):
    counting = write_tokens(tmp_path / "tokens.bin", np.arange(20_000) % 31)
    assert train.main(arguments(counting, tmp_path, 400, optimizer=optimizer, width=32, ema_decay=0.9)) == 0
    nelbo = json.loads((tmp_path / "eval.json").read_text())["nelbo_nats_per_token"]
    assert nelbo < 0.5 * math.log(31)  # what the frequencies alone are worth; the best possible is log(31) / 16
    assert load_dit(tmp_path / "final-bf16").embedding.dtype == torch.bfloat16


KILLED = """
import os, signal, sys
from types import SimpleNamespace
from training import loop, train

step, now = loop.Trainer.train_step, 0.0

def train_step(trainer, *batch):
    global now
    if trainer.step == 60:
        os.kill(os.getpid(), signal.SIGKILL)
    step(trainer, *batch)
    now += 1.0

loop.Trainer.train_step, loop.time = train_step, SimpleNamespace(monotonic=lambda: now)
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_unbroken(tmp_path, token_file, unbroken):
    """Killed at step 60, some steps after its last checkpoint."""
    command = arguments(
        token_file, tmp_path, STEPS, optimizer="muon", schedule="cosine", log_every=1, checkpoint_every=25
    )
    done = subprocess.run([sys.executable, "-c", KILLED, *command], env=child_environment(), cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert len(losses(tmp_path)) == 60
    assert not (tmp_path / "final").exists()
    assert train.main([*command, "--resume", "must"]) == 0
    assert_same_run(tmp_path, unbroken)


@pytest.mark.parametrize("by", ["deadline", "signal"])
def test_a_stopped_run_goes_on_as_if_unbroken(tmp_path, token_file, unbroken, monkeypatch, by):
    """Stopped after step 40: by a clock that a step puts on by a second, or by a signal."""
    command = arguments(token_file, tmp_path, STEPS, optimizer="muon", schedule="cosine")
    step, taken = loop.Trainer.train_step, []

    def train_step(trainer, *batch):
        step(trainer, *batch)
        taken.append(trainer.step)
        if by == "signal" and len(taken) == 40:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "train_step", train_step)
        if by == "deadline":
            clock = SimpleNamespace(monotonic=lambda: float(len(taken)))
            patch.setattr(loop, "time", clock)
            patch.setattr(options, "time", clock)
        assert train.main(command + (["--stop-after", "40"] if by == "deadline" else [])) == 0
    assert len(losses(tmp_path)) == 40
    assert not (tmp_path / "final").exists()
    assert train.main([*command, "--resume", "must"]) == 0
    assert_same_run(tmp_path, unbroken)


def test_a_checkpoint_of_another_run_is_refused(token_file, unbroken, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments(token_file, unbroken, STEPS, optimizer="muon", schedule="cosine", lr=0.5))
    assert "lr: 0.01 there, 0.5 here" in capsys.readouterr().err


def test_evaluation_alone_repeats_the_final_one(tmp_path, token_file, unbroken):
    before = json.loads((unbroken / "eval.json").read_text())
    command = arguments(token_file, unbroken, STEPS)
    assert train.main([*command, "--eval-only"]) == 0
    assert json.loads((unbroken / "eval.json").read_text()) == before


def test_micro_batches_give_the_same_losses(tmp_path, token_file):
    for name, count in (("one", 1), ("four", 4)):
        train.main(arguments(token_file, tmp_path / name, 10, grad_accum=count))
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_block_causal_model_trains_and_is_evaluated(tmp_path):
    """Counting up: only the first token of a text is in doubt, and only in its first block."""
    counting = write_tokens(tmp_path / "tokens.bin", np.arange(5000) % 31)
    options = {"block_causal": 4, "width": 32, "ema_decay": 0.9, "eval_samples": 256}
    assert train.main(arguments(counting, tmp_path, 400, **options)) == 0
    assert load_dit(tmp_path).config.block_causal == 4
    bound = json.loads((tmp_path / "eval.json").read_text())["nelbo_nats_per_token"]
    assert math.log(31) / 16 - 0.02 < bound < 2 * math.log(31) / 16
    with pytest.raises(SystemExit):  # another model than the run's
        train.main(arguments(counting, tmp_path, 400, **(options | {"block_causal": 8})))


def two_processes(module: str, command: list[str]) -> None:
    """Run a training command on two processes of this machine, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", module, *command],
            env=child_environment(RANK=str(rank), LOCAL_RANK=str(rank), **world),
        )
        for rank in range(2)
    ]
    assert [child.wait(timeout=60) for child in children] == [0, 0]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path, token_file):
    train.main(arguments(token_file, tmp_path / "one", 10))
    two_processes("training.train", arguments(token_file, tmp_path / "two", 10, log_every=3))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(tmp_path, token_file, caplog):
    command = arguments(token_file, tmp_path, 40, warmup=0)
    assert train.main([*command, "--stop-after", "0.001"]) == 0
    good = checkpoint.load_checkpoint(tmp_path)
    assert good is not None
    for group in (group for optimizer in good["optimizers"] for group in optimizer["param_groups"]):
        group["peak_lr"] = 1e30
    checkpoint.save_checkpoint(tmp_path, good)
    with caplog.at_level(logging.ERROR):
        assert train.main([*command, "--checkpoint-every", "0"]) == 1
    assert "lower the learning rate" in caplog.text
    kept = checkpoint.load_checkpoint(tmp_path)
    assert kept is not None
    assert good["step"] <= kept["step"] < 40
    assert not (tmp_path / "final").exists()


# ----------------------------------------------------------------------------------------------------- checkpoints


def number(state: dict[str, Any] | None) -> int:
    assert state is not None
    return int(state["step"])


@pytest.mark.parametrize("moment", ["while writing", "before the rename"])
def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch, moment):
    checkpoint.save_checkpoint(tmp_path, {"step": 1})
    checkpoint.save_checkpoint(tmp_path, {"step": 2})

    def half_written(state: Any, file: Any) -> None:
        file.write(b"PK half a file")
        raise OSError("no space left")

    replace = os.replace

    def refused(source: Any, target: Any) -> None:
        if Path(target).name == checkpoint.CURRENT:
            raise OSError("killed")
        replace(source, target)

    with monkeypatch.context() as patch:
        if moment == "while writing":
            patch.setattr(checkpoint.torch, "save", half_written)
        else:
            patch.setattr(os, "replace", refused)
        with pytest.raises(OSError, match=r"no space left|killed"):
            checkpoint.save_checkpoint(tmp_path, {"step": 3})
    assert number(checkpoint.load_checkpoint(tmp_path)) == 2
    checkpoint.save_checkpoint(tmp_path, {"step": 4})
    assert number(checkpoint.load_checkpoint(tmp_path)) == 4


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, {"step": step, "weights": torch.zeros(1000)})
    current = tmp_path / checkpoint.CURRENT
    current.write_bytes(current.read_bytes()[:700])
    assert number(checkpoint.load_checkpoint(tmp_path)) == 1
    assert "cannot be read" in caplog.text
    (tmp_path / checkpoint.PREVIOUS).write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoint.load_checkpoint(tmp_path)


@pytest.mark.parametrize("what", ["weights", "optimiser", "step"])
def test_a_flipped_bit_is_noticed(tmp_path, caplog, what):
    """In a number of a tensor, which PyTorch reads without complaint, or of the settings."""
    states = [
        {"step": step, "model": {"w": torch.ones(64)}, "optimizers": [{"m": torch.full((64,), 2.0)}]} for step in (1, 2)
    ]
    for state in states:
        checkpoint.save_checkpoint(tmp_path, state)
    current = tmp_path / checkpoint.CURRENT
    whole = current.read_bytes()
    number_of = {"weights": torch.ones(3).numpy().tobytes(), "optimiser": torch.full((3,), 2.0).numpy().tobytes()}
    if what == "step":
        saved = torch.load(current, weights_only=True)
        torch.save(saved | {"step": 3}, current)
    else:
        place = whole.index(number_of[what]) + 1
        current.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        torch.load(current, weights_only=True)
    assert number(checkpoint.load_checkpoint(tmp_path)) == 1
    assert "checksum" in caplog.text


def test_a_loop_of_links_is_no_missing_checkpoint(tmp_path):
    """Starting again would overwrite what may be there."""
    (tmp_path / checkpoint.CURRENT).symlink_to(tmp_path / checkpoint.CURRENT)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
        checkpoint.load_checkpoint(tmp_path)


@pytest.mark.parametrize("line", ["null", "[1]", '{"step": null}', '{"step": "2", "loss": 1}', '{"st', "3", "\x00"])
def test_spoilt_lines_of_a_log_are_dropped(tmp_path, line):
    log = tmp_path / "log.jsonl"
    log.write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n{{"step": 2, "loss": 1.0}}\n{{"step": 3, "loss": 1.0}}\n')
    checkpoint.JsonLines(log, 2).close()
    assert losses(tmp_path) == [2.0, 1.0]


def test_a_full_disk_ends_a_run_with_a_sentence_and_its_last_checkpoint(tmp_path, token_file, monkeypatch, caplog):
    command = arguments(token_file, tmp_path, 40, checkpoint_every=0)
    save, calls = torch.save, []

    def disk_full(state: Any, file: Any) -> None:
        calls.append(state["step"])
        if len(calls) == 3:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(state, file)

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(checkpoint.torch, "save", disk_full)
        assert train.main(command) == 1
    assert "No space left on device" in caplog.text
    assert number(checkpoint.load_checkpoint(tmp_path)) == 2
    assert not list(tmp_path.glob(".*.tmp"))
    assert train.main(command) == 0
    assert len(losses(tmp_path)) == 40


# ------------------------------------------------------------------------------------------------- refused arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "--tokens must be greater than 0"),
        ({"lr": "nan"}, "--lr must be greater than 0"),
        ({"eps": 1.0}, "--eps must lie between"),
        ({"ema_decay": 1.0}, "--ema-decay must lie between"),
        ({"warmup": -1}, "--warmup must not be negative"),
        ({"width": 15}, "width 15 must split into 2 heads"),
        ({"grad_accum": 3}, "batch size 8 does not divide"),
        ({"length": 30_000}, "fewer than the length"),
        ({"data": "/nowhere/x.bin"}, "no token file, as there is no /nowhere/x.json beside it"),
        ({"resume": "must"}, "no checkpoint in"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, token_file, capsys, changes, message):
    with pytest.raises(SystemExit) as refusal:
        train.main(arguments(token_file, tmp_path / "out", 5, **changes))
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_token_files_of_different_tokenizers_are_refused(tmp_path, token_file, capsys):
    other = write_tokens(tmp_path / "other.bin", np.arange(1000) % MASK, tokenizer="u")
    with pytest.raises(SystemExit):
        train.main(arguments(token_file, tmp_path / "out", 5, valid=other))
    assert "different tokenizers" in capsys.readouterr().err


def test_a_token_file_cut_short_is_refused(tmp_path):
    path = write_tokens(tmp_path / "t.bin", np.arange(100) % MASK)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="100 tokens of its description"):
        data.open_tokens(path)


# ------------------------------------------------------------------------------------------- from a text to a sample


@pytest.mark.parametrize("more", [[], ["--block-causal", "24"]])
def test_any_text_trains_and_the_printed_line_samples(tmp_path, caplog, capsys, more):
    """With nothing but the text: a tokenizer, sizes that suit it, a held-out part, and the line at the end."""
    text = tmp_path / "book.txt"
    words = np.random.default_rng(0).integers(0, 40, 6000)
    text.write_text("".join(f"word{word}{' ' if place % 12 else chr(10)}" for place, word in enumerate(words)))
    command = ["--data", text, "--out", tmp_path / "run", "--tokens", 3000, "--batch-size", 8, "--eval-samples", 8]
    command = [str(part) for part in [*command, "--width", 32, "--blocks", 1, "--device", "cpu", *more]]
    with caplog.at_level(logging.INFO):
        assert train.main(command) == 0
    line = caplog.text.partition("sample from it:\n")[2].split()
    assert line[:2] == ["mdkern", "sample"]
    assert cli.main([*line[1:], "--device", "cpu", "--seed", "1"]) == 0
    assert len(capsys.readouterr().out) > 50
    folder = tmp_path / "run" / "data"
    train_tokens, info = data.open_tokens(folder / "train.bin")
    valid_tokens, _ = data.open_tokens(folder / "valid.bin")
    assert 0.03 < len(valid_tokens) / (len(train_tokens) + len(valid_tokens)) < 0.07
    backend = data.TextEncoder.load(folder / "tokenizer").backend
    both = [int(token) for tokens in (train_tokens, valid_tokens) for token in tokens]
    assert backend.decode(both[:-1]).strip() == text.read_text().strip()
    assert info.vocab_size <= 512
    assert (info.vocab_size, info.mask_id) == (backend.get_vocab_size(), backend.get_vocab_size() - 1)
    before = (folder / "train.bin").stat().st_mtime_ns
    assert train.main(command) == 0  # finished: nothing is made again
    assert (folder / "train.bin").stat().st_mtime_ns == before


def test_sizes_suit_the_device_and_the_data():
    for device, count, blocks, length in (("cpu", 10**6, 4, 64), ("cpu", 50, 4, 50), ("cuda", 10**9, 12, 1024),
                                          ("cuda", 10**7, 12, 256)):  # fmt: skip
        args = train.build_parser().parse_args(["--data", "x", "--out", "y", "--device", device])
        sizes.choose_sizes(args, count, 10**6)
        assert (args.blocks, args.length) == (blocks, length)
        assert args.tokens <= 100 * count
    args = train.build_parser().parse_args(["--data", "x", "--out", "y", "--device", "cpu", "--preset", "mdlm"])
    sizes.choose_sizes(args, 10**9, 10**6)
    assert (args.blocks, args.width, args.batch_size, args.lr, args.optimizer) == (12, 768, 512, 3e-4, "adamw")
    args = train.build_parser().parse_args(["--data", "x", "--out", "y", "--device", "cpu", "--width", "64"])
    sizes.choose_sizes(args, 10**6, 10**6)
    assert (args.width, args.blocks) == (64, 4)


def test_memory_decides_on_micro_batches_and_refuses_what_cannot_fit(monkeypatch):
    config = DiTConfig(vocab_size=50_258, mask_id=50_257, max_length=1024, tie_head=True)
    args = argparse.Namespace(batch_size=512, length=1024, grad_accum=None)
    free = {"bytes": 64 << 30}
    monkeypatch.setattr(sizes, "available_bytes", lambda device: free["bytes"])
    sizes.fit_memory(args, config, CPU)
    split = args.grad_accum
    per_micro_batch = sizes.training_bytes(config, 1024, 512 // split, "cpu")
    assert per_micro_batch < 0.7 * free["bytes"] < sizes.training_bytes(config, 1024, 512 // (split // 2), "cpu")
    args.grad_accum = 1
    with pytest.raises(ValueError, match=r"would take about \d+\.\d GB, and 68\.7 GB are free: .*larger --grad-accum"):
        sizes.fit_memory(args, config, CPU)
    args.grad_accum, free["bytes"] = None, 1 << 30
    with pytest.raises(ValueError, match=r"1\.1 GB are free"):
        sizes.fit_memory(args, config, CPU)


def test_a_run_that_goes_on_keeps_its_micro_batches(tmp_path, token_file, monkeypatch):
    """However much memory is free then."""
    command = arguments(token_file, tmp_path, 30, checkpoint_every=0)
    with monkeypatch.context() as patch:
        config = DiTConfig(vocab_size=VOCAB, mask_id=MASK, num_blocks=1, width=16, num_heads=2, tie_head=True)
        needed = sizes.training_bytes(config, 16, 2, "cpu")
        patch.setattr(sizes, "available_bytes", lambda device: int(needed / 0.7) + 1)
        assert train.main([*command, "--stop-after", "0.001"]) == 0
    assert checkpoint.saved_config(tmp_path)["grad_accum"] == 4
    assert train.main(command) == 0
    assert len(losses(tmp_path)) == 30


def test_a_signal_acts_between_two_micro_batches(tmp_path, token_file):
    """The step is given up, its gradients with it, and done anew: the run is the unbroken one."""
    command = arguments(token_file, tmp_path / "whole", 6, grad_accum=4)
    assert train.main(command) == 0
    command = arguments(token_file, tmp_path / "cut", 6, grad_accum=4)
    calls = []

    def forward(self: Objective, *batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 4 * 2 + 2:  # the second micro-batch of the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return Objective.plain_forward(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "plain_forward", Objective.forward, raising=False)
        patch.setattr(Objective, "forward", forward)
        assert train.main(command) == 0
    assert len(calls) == 4 * 2 + 2
    assert number(checkpoint.load_checkpoint(tmp_path / "cut")) == 2
    assert train.main(command) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_texts_are_named(tmp_path, tokenizer_folder, capsys, damage):
    source = tmp_path / "text.txt.xz"
    whole = lzma.compress(np.random.default_rng(0).integers(97, 120, 20_000).astype(np.uint8).tobytes())
    spoilt = whole[: len(whole) // 2] if damage == "cut" else whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    source.write_bytes(spoilt)
    with pytest.raises(SystemExit):
        data.main(["tokenize", "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "t.bin"), str(source)])
    assert "text.txt.xz is damaged or cut short" in capsys.readouterr().err
    assert not (tmp_path / "t.bin").exists()


def test_a_text_takes_bounded_memory_whatever_it_unpacks_to(tmp_path, tokenizer_folder, monkeypatch):
    """An endless line is refused before it is read whole; empty documents are written as they come."""
    monkeypatch.setattr(data, "LONGEST_LINE", 1000)
    monkeypatch.setattr(data, "BATCH_CHARS", 100)
    line = tmp_path / "line.txt.xz"
    line.write_bytes(lzma.compress(b"a" * 10**7))
    with pytest.raises(ValueError, match="a line of more than 1000 characters"):
        data.tokenize([str(line)], tokenizer_folder, tmp_path / "t.bin")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n<|endoftext|>\n" * 1000)
    batches = list(data._batches(data.documents_text([str(empty)])))
    assert max(map(len, batches)) <= 100


def test_unpacking_stops_at_the_described_size(tmp_path, token_file):
    packed = data.pack(token_file, tmp_path / "packed")
    packed.write_bytes(lzma.compress(bytes(1 << 24)))
    with pytest.raises(ValueError, match="more than the 40000 bytes of its description"):
        data.unpack(packed, tmp_path / "out")
    packed.write_bytes(packed.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        data.unpack(packed, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin*"))


# ----------------------------------------------------------------------------------------------------------- judge


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory, token_file: Path) -> Path:
    out = tmp_path_factory.mktemp("judge")
    command = ["--data", token_file, "--valid", token_file, "--out", out, "--layers", 1, "--width", 16, "--heads", 2,
               "--length", 16, "--tokens", 100 * 16 * 16, "--batch-size", 16, "--warmup", 5, "--lr", 2e-2,
               "--ema-decay", 0.9, "--eval-samples", 64, "--device", "cpu"]  # fmt: skip
    assert judge.main([str(part) for part in command]) == 0
    return out


def test_the_judge_learns_and_is_saved_for_transformers(judge_folder):
    from transformers import GPT2LMHeadModel

    result = json.loads((judge_folder / "eval.json").read_text())
    assert math.log(3) < result["nats_per_token"] < 0.6 * math.log(31)  # the chain's entropy is log 3
    assert GPT2LMHeadModel.from_pretrained(judge_folder / "final").dtype == torch.bfloat16


def test_the_judges_likelihood_is_the_chain_rule(token_file):
    torch.manual_seed(0)
    model = judge.make_judge(data.read_info(token_file), 1, 16, 2, 16).eval()
    sequences = torch.randint(0, VOCAB, (5, 12))
    expected = torch.zeros(5)
    for end in range(1, 12):
        with torch.no_grad():
            log_probs = model(sequences[:, :end]).logits[:, -1].log_softmax(-1)
        expected -= log_probs.gather(1, sequences[:, end : end + 1])[:, 0] / 11
    for batch_size in (64, 2):
        judged = score(model, sequences, batch_size=batch_size).nats_per_token()
        assert torch.allclose(judged.float(), expected, atol=1e-5)
    for bad in (sequences[0], torch.zeros(2, 17, dtype=torch.int64), sequences + VOCAB):
        with pytest.raises(ValueError, match=r"must be \[N, L\]|must hold ids in"):
            score(model, bad)


def test_only_the_commands_own_news_are_shown(caplog, monkeypatch):
    """Libraries' news, such as where a model was written for the moment, are not: only their warnings."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])

    def work(*_):
        for name in ("training.loop", "/lib/huggingface_hub/serialization/_torch.py"):
            logging.getLogger(name).info("news of %s", name)
            logging.getLogger(name).warning("warning of %s", name)

    parser = argparse.ArgumentParser()
    parser.set_defaults(device="cpu", float32=False)
    assert options.run_command(parser, [], lambda args: None, work) == 0
    shown = [record.message.split("/")[0] for record in caplog.records]
    assert shown == ["news of training.loop", "warning of training.loop", "warning of "]


def test_an_empty_text_is_refused_in_two_lines(tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(SystemExit, match="2"):
        train.main(["--data", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "run"), "--device", "cpu"])
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ")
    assert "there was no text to make it of" in error
