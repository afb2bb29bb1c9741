"""The benchmark of floors: what it counts as a pass's work, how it chooses among libraries, and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_floors as bench
from benchmarks import report
from benchmarks.bare import Attention, Bare, Product, dit_work, llama_work
from benchmarks.graph_profile import Kernel, busy_time, by_kind, by_name
from benchmarks.harness import measure_parts
from mdkern import DiT, DiTConfig


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_work_of_a_dit_has_the_flops_that_the_model_counts(num_blocks: int, fp8: bool) -> None:
    config = DiTConfig(vocab_size=200, mask_id=199, max_length=32, num_blocks=num_blocks, width=64, num_heads=2)
    model = DiT(config)
    work = dit_work(config, 3, 32, 4, 12, fp8=fp8, table=False)
    assert sum(item.flops for item in work) == 3 * model.flops(32, 4)
    looked_up = dit_work(config, 3, 32, 4, 12, fp8=fp8, table=True)
    kinds = 2 if num_blocks == 1 else 3  # of queries, keys and values: the last block's queries are not in the table
    assert sum(item.flops for item in work) - sum(item.flops for item in looked_up) == 2 * 96 * 64 * kinds * 64


def test_in_fp8_the_first_and_the_last_block_keep_what_mdkern_keeps() -> None:
    """A byte less for each weight of the two MLPs, of one block's four attention layers, of the last's two."""
    config = DiTConfig(vocab_size=200, mask_id=199, max_length=32, num_blocks=3, width=64, num_heads=2)
    whole, rounded = (
        sum(item.weight_bytes for item in dit_work(config, 1, 32, 4, 4, fp8=fp8)) for fp8 in (False, True)
    )
    assert whole - rounded == 64 * 64 * (2 * 8 + 4 + 2)


def test_the_work_of_a_llama_is_that_of_its_layers() -> None:
    sizes = {
        "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    work = llama_work(sizes, 2, 40, 8)
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    assert sum(item.weight_bytes for item in work) == 2 * (3 * layer + 64 * 100)
    keys = 2 * 40 * 2 * 64 * 64  # keys and values of all positions
    of_row = 2 * (layer - 2 * 64 * 32) + 4 * 40 * 64
    assert sum(item.flops for item in work) == 3 * keys + (2 * 80 + 16) * of_row + 2 * 16 * 64 * 100
    in_fp8 = llama_work(sizes, 2, 40, 8, fp8=True)
    assert [item.fp8 for item in in_fp8 if isinstance(item, Product)] == [True] * (len(in_fp8) - 4) + [False]


def test_the_fastest_way_of_each_piece_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails is left out with the reason; without any there is no floor."""
    ran: list[str] = []
    cost = {"weight by output": 2.0, "weight by input": 1.0, "scales of rows": 1.0, "one scale": 3.0, "PyTorch": 1.0}

    def time(self: Bare, runs: Any) -> float:
        assert len(runs) == 2
        name = next(name for ways in self.ways for name, run in ways.items() if run is runs[0])
        if name not in cost:
            raise RuntimeError("not in this version\nat all")
        return cost[name]

    monkeypatch.setattr(Bare, "time", time)
    work = [Product(16, 32, 48), Product(16, 32, 48, fp8=True, rounded=True), Attention(1, 2, 8, 16, 32)] * 2
    bare = Bare(work, torch.device("cpu"))
    for ways in bare.ways:
        ways.update({name: lambda name=name: ran.append(name) for name in ways})
    bare.run()
    assert ran == ["weight by input", "scales of rows", "PyTorch"] * 2
    ((where, why),) = bare.left_out.items()
    assert where.endswith("one scale, rounded")
    assert why == "RuntimeError: not in this version"
    cost.clear()
    with pytest.raises(RuntimeError, match="no library runs"):
        bare.choose()


def test_ways_of_a_product_compute_it() -> None:
    torch.manual_seed(0)
    for item in (Product(16, 32, 48), Product(16, 32, 48, fp8=True)):
        bare = Bare([item], torch.device("cpu"))
        x = bare.shared["x", (16, 32), torch.float8_e4m3fn if item.fp8 else None].double()
        (ways,) = bare.ways
        for run in ways.values():
            out: Any = run()
            weight: torch.Tensor = run.args[1]  # type: ignore[attr-defined]
            expected = x @ weight.double() * (32**-0.5 if item.fp8 else 1.0)
            torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)


def test_kernels_that_overlap_are_counted_once() -> None:
    kernels = [Kernel("b", 2.0, 5.0), Kernel("a", 0.0, 3.0), Kernel("a", 6.0, 8.0), Kernel("b", 6.5, 7.0)]
    assert busy_time(kernels) == pytest.approx(7.0)
    rows = by_name(kernels, (("first", ("a",)), ("rest", ("",))), 2)
    assert [(row["kernel"], row["launches"]) for row in rows] == [("a", 1.0), ("b", 1.0)]
    assert by_kind(rows, (("first", ()), ("rest", ()))) == pytest.approx({"first": 2.5e-3, "rest": 1.0e-3})


def test_parts_are_kept_and_gone_on_with(tmp_path: Path) -> None:
    path, done, known = tmp_path / "new" / "x.json", list[str](), {"environment": {"device": "a"}}

    def job(name: str, fails: bool = False) -> Any:
        def run() -> str:
            done.append(name)
            if fails:
                raise RuntimeError("no memory")
            return name * 2

        return run

    first = measure_parts(path, known, {"a": job("a"), "b": job("b", fails=True), "c": job("c")}, False)
    assert first == json.loads(path.read_text()) == known | {"failed": ["b"], "a": "aa", "c": "cc"}
    asked: list[list[str]] = []
    second = measure_parts(path, known, {"a": job("a"), "b": job("b")}, False, asked.append)
    assert second == json.loads(path.read_text()) == known | {"failed": [], "a": "aa", "b": "bb", "c": "cc"}
    assert (asked, done) == ([["b"]], ["a", "b", "c", "b"])
    measure_parts(path, known, {"a": job("a", fails=True)}, True)
    assert "a" not in json.loads(path.read_text())
    other = measure_parts(path, {"environment": {"device": "b"}}, {"c": job("c")}, False)
    assert other == {"environment": {"device": "b"}, "failed": [], "c": "cc"}


@pytest.mark.slow
def test_it_runs_and_keeps_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "KEPT", tmp_path / "floors.json")
    monkeypatch.setattr(report, "load", lambda name: json.loads((tmp_path / f"{name}.json").read_text()))
    assert bench.floors() == bench.ABSENT
    assert list(report.compare_floors()) == []
    assert bench.main([str(tmp_path), "--tiny"]) == 0
    content = json.loads((tmp_path / "floors.json").read_text())
    assert set(content) == {"environment", "failed", *bench.PARTS}
    paper, rounded = content["paper"], content["paper-fp8"]
    assert paper["target"]["ms"] / rounded["target"]["ms"] == pytest.approx(17 / 12.5)
    assert rounded["arithmetic_ms"] < paper["arithmetic_ms"]
    assert content["longer"]["run"]["passes"] == 1  # a block of 32 in a step
    assert content["pair"]["target"]["ms"] == pytest.approx(45.0 / content["pair"]["run"]["passes"])
    assert all(content[part]["fp8"] == part.endswith("fp8") for part in bench.SETTINGS)
    assert bench.floors().count("\n| ") == 2 + len(bench.SETTINGS)
    comparisons = list(report.compare_floors())
    assert [entry.times for entry in comparisons] == [
        content[part]["ms"]["mdkern"]["median"] / content[part]["ms"]["libraries"]["median"] for part in bench.SETTINGS
    ]


def test_the_table_sets_targets_beside_the_libraries() -> None:
    row = {
        "setting": "one: 2 × 64", "texts": [16, 1024], "fp8": True, "target": {"ms": 3.0, "why": "so"},
        "run": {"seconds": [3.0, 5.0, 4.0], "passes": 640}, "arithmetic_ms": 2.0, "weights_ms": 0.5,
        "ms": {"mdkern": {"median": 5.0}, "libraries": {"median": 4.0}},
    }  # fmt: skip
    profile = {"kernels": [{"kind": "products", "ms": 3.0}, {"kind": "attention", "ms": 1.0}], "gaps_ms": 0.25}
    known = {"device": "a card", "torch": "2", "triton": "3"}
    content = {"environment": known, "pair": row, "kernels": {"pair": profile, "long": profile}}
    text = bench.table(content)
    assert "attention take: 1 of 1." in text
    lines = [line for line in text.splitlines() if line.startswith("| one")]
    assert lines == [
        "| one: 2 × 64, 16 × 1,024, fp8 | so | 3.000 | 5.000 | 4.000 | 2.000 | 0.500 | 1.25 × | 0.75 × |"
        " 4.000 s, 640 passes (80%) |",
        "| one: 2 × 64, 16 × 1,024, fp8 | 0.000 | 1.000 | 0.000 | 3.000 | 0.000 | 0.250 |",
    ]
