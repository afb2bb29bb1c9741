"""Output layers divided over processes: on every process the samples of one process."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import mdkern
from mdkern import DiT
from mdkern.decoders import Threshold, TopProbability
from mdkern.kernels.head.sharded import ALIGNMENT, shard_of
from tests.conftest import random_dit

LENGTH, VOCAB = 12, 1500  # four processes have 256, 512, 256 and 476 ids of it
SIZE = {"vocab_size": VOCAB, "mask_id": VOCAB - 1, "max_length": LENGTH}
SHARDS = [shard_of(VOCAB, rank, 4) for rank in range(4)]
PROMPTS = torch.full((3, LENGTH), VOCAB - 1)
PROMPTS[1, :2], PROMPTS[2, 5] = torch.tensor([700, 3]), 1400
SAME: dict[str, dict[str, Any]] = {
    "planned": {"schedule": "L3 H6 L3", "num_samples": 3, "temperature": 0.7, "return_history": True},
    "greedy": {"num_samples": 2, "temperature": 0.0, "steps": 5},
    "step by step": {"schedule": "L4 H4", "input_ids": PROMPTS, "decoder": Threshold(0.02)},
    "with a cache": {
        "input_ids": PROMPTS,
        "decoder": TopProbability(),
        "block_length": 2,
        "steps_per_block": 2,
        "cache": "dual",
    },
    "entropies": {"input_ids": PROMPTS, "decoder": "entropy", "steps": 6, "temperature": 0.0},
    "of the sampler": {"num_samples": 2, "decoder": TopProbability(of="sampler"), "temperature": 0.5, "steps": 4},
    "guided": {"input_ids": PROMPTS[1:], "guidance_scale": 1.5, "steps": 6},
    "ends of text": {"num_samples": 3, "decoder": "margin", "steps": 6, "stop_at_eos": True},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "top_k": ({"top_k": 5}, "top_k, top_p and min_p must be left out"),
    "top_p": ({"top_p": 0.9}, "top_k, top_p and min_p must be left out"),
    "processor": ({"logits_processor": lambda ids, scores: scores}, "logits_processor must be None"),
}


def models(device: str = "cpu") -> dict[str, DiT]:
    return {name: random_dit(seed, **SIZE, num_blocks=seed, eos_id=7).to(device) for name, seed in (("H", 2), ("L", 1))}


def call(models: dict[str, Any], options: dict[str, Any]) -> mdkern.SampleOutput:
    shape = {"length": LENGTH} if "input_ids" not in options else {}
    given = models if "schedule" in options else models["H"]
    return mdkern.sample(given, **({"seed": 5, "batch_size": 2, "progress": False} | shape | options))


def refusal(function: Any, *arguments: Any, **options: Any) -> str:
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def join(rank: int, ranks: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(backend, f"file://{folder}/store", timedelta(seconds=100), world_size=ranks, rank=rank)


def worker(rank: int, ranks: int, folder: str) -> None:
    join(rank, ranks, folder, "gloo")
    whole = models()
    sharded = {name: mdkern.shard_head(model) for name, model in whole.items()}
    results: dict[str, Any] = {name: call(sharded, options) for name, options in SAME.items()}
    ids = torch.arange(LENGTH)[None]
    results["logits"] = sharded["H"].logits(ids)
    results["no seed"] = call(
        sharded, {"num_samples": 1, "generator": torch.Generator().manual_seed(rank), "seed": None}
    )
    for name, (options, _) in REFUSED.items():
        results[f"refused {name}"] = refusal(call, sharded, {"num_samples": 1} | options)
    different = {"temperature": 0.5} if rank == 1 else {}
    results["different"] = refusal(call, sharded, {"num_samples": 1} | different)
    results["bad on rank 1"] = refusal(call, sharded, {"num_samples": rank != 1})
    results["mixed"] = refusal(call, {"H": sharded["H"], "L": whole["L"]}, {"schedule": "H3 L3"})
    results["distributed"] = refusal(mdkern.sample_distributed, sharded["H"], num_samples=2, seed=0)
    results["twice"] = refusal(mdkern.shard_head, sharded["H"])
    results["other weights"] = refusal(mdkern.shard_head, random_dit(rank, **SIZE))
    function = mdkern.adapt(lambda ids: torch.zeros(*ids.shape, VOCAB), vocab_size=VOCAB, mask_id=VOCAB - 1)
    results["by logits"] = refusal(mdkern.shard_head, function)
    part = dist.new_group([0, 1])
    if rank < 2:
        results["two of them"] = call({"H": mdkern.shard_head(whole["H"], part)}, SAME["greedy"])
    with torch.no_grad():
        whole["H"].head_weight[800] = torch.nan
    results["NaN"] = refusal(call, sharded, {"num_samples": 1})
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(target: Any, ranks: int, folder: str) -> list[dict[str, Any]]:
    """What each process has saved."""
    torch.multiprocessing.spawn(target, (ranks, folder), nprocs=ranks)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(worker, 4, str(tmp_path_factory.mktemp("shards")))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_every_process_has_the_samples_of_one(results: list[dict[str, Any]], name: str) -> None:
    alone = call(models(), SAME[name])
    for theirs in results:
        assert torch.equal(theirs[name].sequences, alone.sequences)
        assert all(torch.equal(theirs[name].nfe[model], alone.nfe[model]) for model in alone.nfe)
        if alone.history is not None:
            assert torch.equal(theirs[name].history.step, alone.history.step)


@pytest.mark.slow
def test_tokens_of_all_parts_are_drawn(results: list[dict[str, Any]]) -> None:
    drawn = results[0]["planned"].sequences.flatten()
    assert all(bool(((drawn >= first) & (drawn < stop)).any()) for first, stop in SHARDS)


@pytest.mark.slow
def test_logits_are_joined(results: list[dict[str, Any]]) -> None:
    alone = mdkern.adapt(models()["H"]).logits(torch.arange(LENGTH)[None])
    for theirs in results:
        torch.testing.assert_close(theirs["logits"], alone)


@pytest.mark.slow
def test_without_a_seed_the_first_process_takes_one(results: list[dict[str, Any]]) -> None:
    first = results[0]["no seed"]
    assert torch.equal(first.sequences, call(models(), {"num_samples": 1, "seed": first.seed}).sequences)
    assert all(torch.equal(theirs["no seed"].sequences, first.sequences) for theirs in results)


@pytest.mark.slow
def test_a_part_of_the_processes_may_share(results: list[dict[str, Any]]) -> None:
    alone = call(models(), SAME["greedy"])
    assert all(torch.equal(theirs["two of them"].sequences, alone.sequences) for theirs in results[:2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [(f"refused {name}", message) for name, (_, message) in REFUSED.items()]
    + [
        ("different", "ValueError: the arguments on rank 1 differ from those on rank 0 in temperature"),
        ("mixed", "ValueError: models of one call must all be divided over the same processes"),
        ("distributed", "ValueError: sample_distributed needs a whole output layer"),
        ("twice", "ValueError: the model's output layer is divided already"),
        ("other weights", "ValueError: the arguments on rank 1 differ from those on rank 0 in model"),
        ("by logits", "shard_head needs an output layer that can be divided"),
        ("bad on rank 1", "num_samples must be"),
        ("NaN", "NaN or infinite weights"),
    ],
)
def test_what_cannot_be_is_refused_on_all(results: list[dict[str, Any]], name: str, message: str) -> None:
    for theirs in results:
        assert message in theirs[name]


@pytest.mark.parametrize(("vocab", "ranks"), [(1, 1), (40, 3), (1500, 4), (50_258, 8), (126_464, 4), (262_144, 7)])
def test_shards_are_even_and_cover_the_vocabulary(vocab: int, ranks: int) -> None:
    shards = [shard_of(vocab, rank, ranks) for rank in range(ranks)]
    assert [first for first, _ in shards] == [0] + [stop for _, stop in shards[:-1]]
    assert shards[-1][1] == vocab
    assert all(first % ALIGNMENT == 0 or first == vocab for first, _ in shards)
    sizes = [stop - first for first, stop in shards]
    assert max(sizes) - min(sizes) <= 2 * ALIGNMENT


def test_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="shard_head needs torch"):
        mdkern.shard_head(models()["H"])


SHARED_OUT: dict[str, Any] = {"schedule": "L3 H6 L3", "num_samples": 5, "length": LENGTH, "seed": 3, "progress": False}
GPU_CASES = [name for name in SAME if name != "entropies"]


def gpu_worker(rank: int, ranks: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    join(rank, ranks, folder, "nccl")
    whole = models(f"cuda:{rank}")
    sharded = {name: mdkern.shard_head(model) for name, model in whole.items()}
    results: dict[Any, Any] = {"shared out": mdkern.sample_distributed(whole, **SHARED_OUT).sequences.cpu()}
    for name in GPU_CASES:
        options = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in SAME[name].items()}
        for graphs in (True, False):
            results[name, graphs] = call(sharded, options | {"cuda_graphs": graphs}).sequences.cpu()
    results["graphs"] = len(mdkern.graphs.held())
    torch.save(results, f"{folder}/{rank}.pt")
    mdkern.graphs.clear()
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_have_the_samples_of_one(tmp_path: Any) -> None:
    """Of a divided vocabulary, with NCCL inside CUDA graphs and outside of them; and of samples that are shared out."""
    found = run(gpu_worker, 2, str(tmp_path))
    whole = models("cuda")
    for name in GPU_CASES:
        options = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in SAME[name].items()}
        alone = call(whole, options).sequences.cpu()
        for theirs in found:
            assert torch.equal(theirs[name, True], alone), name
            assert torch.equal(theirs[name, False], alone), name
    assert all(theirs["graphs"] > 1 for theirs in found)
    alone = mdkern.sample(whole, **SHARED_OUT).sequences.cpu()
    assert all(torch.equal(theirs["shared out"], alone) for theirs in found)
