"""The documents are true: Python runs as pasted (at smaller sizes), command lines are understood, names are those of
the code, links lead somewhere, and every figure is drawn from the results."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

import mdkern
from benchmarks import report
from benchmarks.bench_vocab_projection import GEMM, GREEDY, MIXED, SAMPLED
from benchmarks.harness import RESULTS
from benchmarks.report import Comparison
from mdkern.cli.decoder import parse_decoder
from mdkern.cli.main import build_parser
from mdkern.decoders import DECODERS, by_name
from mdkern.evaluation.search import Results
from tests.problems.canvas_models import small_model
from tests.problems.hf_models import MASK, llada

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMALLER = {
    r"num_samples=\d+": "num_samples=2",
    r"length=(64|128|256), steps=(64|128|256)": "length=32, steps=32",
    r"L16 H96 L16": "L4 H24 L4",
    r"length=256, seed": "length=32, seed",
    r"L64 H128 L64": "L8 H16 L8",
    r'decoder="top_probability"': 'decoder="top_probability", length=32, steps=32',
    r"\(1, 128\)": "(1, 12)",
    r"\(1, 64\)": "(1, 24)",
    r", samples=\d+": ", samples=4",
    r"block_length=32": "block_length=4",
    r"max_new_tokens=512": "max_new_tokens=16",
    r'"cuda"': '"cpu"',
}
FIGURE = re.compile(r"\d (?:×|µs|ms\b|s\b|tokens/s|points)|\d+(?:\.\d+)? times as fast")  # what only a run can tell


class TheirTokenizer:
    """What the README asks of LLaDA's."""

    def apply_chat_template(self, chat: list[dict[str, str]], add_generation_prompt: bool, tokenize: bool) -> str:
        return "".join(turn["content"] for turn in chat)[:8]

    def __call__(self, text: str, **_: Any) -> Any:
        ids = [5 + ord(letter) % (MASK - 5) for letter in text]
        return transformers.BatchEncoding({"input_ids": torch.tensor([ids])})

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


class GemmaTokenizer:
    """What the guide asks of DiffusionGemma's."""

    def apply_chat_template(self, chat: list[dict[str, str]], **_: Any) -> Any:
        ids = [3 + ord(letter) % 60 for letter in chat[0]["content"]]
        return transformers.BatchEncoding({"input_ids": torch.tensor([ids])})

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


@pytest.mark.slow
def test_every_python_block_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load = mdkern.from_pretrained
    monkeypatch.chdir(tmp_path)
    searched = Results(Path("search.jsonl"), {})  # what the guide's search says
    for models, score in re.findall(r"^ *(?:best|worst)  ([HL]{4})  ([\d.]+) ±", GUIDE, re.MULTILINE):
        searched.add(tuple(models), torch.tensor([float(score)]))

    def load_or_stand_in(name: str, **options: Any) -> Any:
        if not name.startswith("GSAI-ML/"):
            return load(name, **options)
        model = mdkern.adapt(llada())
        model.tokenizer = TheirTokenizer()
        return model

    monkeypatch.setattr(mdkern, "from_pretrained", load_or_stand_in)
    has_gemma = hasattr(transformers, "DiffusionGemmaForBlockDiffusion")
    if has_gemma:
        gemma = transformers.DiffusionGemmaForBlockDiffusion
        monkeypatch.setattr(gemma, "from_pretrained", lambda *_, **__: small_model())
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: GemmaTokenizer())
    assert "```py\n" not in README + GUIDE
    blocks = re.findall(r"```python\n(.*?)```", README + GUIDE, re.DOTALL)
    assert len(blocks) >= 7
    names: dict[str, Any] = {"__name__": "guide"}  # a dataclass asks for its module's
    monkeypatch.setitem(sys.modules, "guide", ModuleType("guide"))
    for block in blocks:
        needs_gpu = "batch_invariant" in block
        if ("DiffusionGemma" in block and not has_gemma) or (needs_gpu and not torch.cuda.is_available()):
            continue
        for pattern, smaller in ({} if needs_gpu else SMALLER).items():
            block = re.sub(pattern, smaller, block)
        names.pop("out", None)
        with pytest.warns() if "def uniform" in block else pytest.MonkeyPatch.context():
            exec(compile(block, "the documents", "exec"), names)
        if re.search("^out = ", block, re.MULTILINE):
            assert names["out"].sequences.ndim == 2
    printed = capsys.readouterr().out
    assert "of the FLOPs saved" in printed
    assert "\nH:50% L:50%\n" in printed  # the schedule fitted to the search


def test_every_command_line_is_understood() -> None:
    lines = re.findall(r"`mdkern (\w+ [^`]+)`", README + GUIDE)
    lines += re.findall(r"-m mdkern (\w+ [^`]+)`", README + GUIDE)
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", README + GUIDE, re.DOTALL):
        lines += re.findall(r"^mdkern (.+)$", block.replace("\\\n", " "), re.MULTILINE)
    assert len(lines) >= 10
    for line in lines:
        arguments = build_parser().parse_args(shlex.split(line))
        if hasattr(arguments, "decoder") and "=runs/" not in arguments.decoder:  # a file that a command before writes
            parse_decoder(arguments.decoder)


def test_the_decoders_are_all_named_and_need_what_is_said() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)`(?: \(needs `(\w+)`\))?", README, re.MULTILINE)
    assert {name: kind for kind, name, _ in rows} == {name: kind.__name__ for name, kind in DECODERS.items()}
    for _, name, needed in rows:
        if needed:
            with pytest.raises(ValueError, match=needed):
                by_name(name)
        else:
            by_name(name)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_module_has_its_place() -> None:
    """CONTRIBUTING.md names no file that is not there, and its map every folder and module of the package's top."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    places = text[text.index("## The map") : text.index("## Glossary")]
    for path in (ROOT / "mdkern").iterdir():
        part_of_another = path.name.startswith("_") or path.suffix not in ("", ".py")
        assert part_of_another or path.name in places, path.name
    folders = ("", "mdkern/", "mdkern/**/", "benchmarks/", "tests/")
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", text):
        assert any(found for folder in folders for found in ROOT.glob(folder + name)), name
    for name, file in re.findall(r"`(\w+)` (?:is )?in `([\w/]+\.py)`", text):
        assert re.search(rf"^(?:def|class) {name}\b", (ROOT / "mdkern" / file).read_text(), re.MULTILINE), name


def anchors(text: str) -> set[str]:
    """Of the headings, as they are made on a page: lower case, hyphens for spaces, no other punctuation."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_every_linked_file_is_there(document: Path) -> None:
    for link, anchor in re.findall(r"\]\(((?!http)[^)#]*)(?:#([\w-]+))?\)", document.read_text()):
        target = document.parent / link if link else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), f"{link}#{anchor}"


@pytest.mark.parametrize("document", [*report.DOCUMENTS, ROOT / "docs" / "guide.md"], ids=lambda path: path.name)
def test_no_figure_is_written_by_hand(document: Path) -> None:
    by_hand = report.PLACE.sub("", document.read_text())
    assert "<!--" not in by_hand, "a mark without its other"
    assert not FIGURE.findall(by_hand)


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    assert report.main() == 0, "python -m benchmarks.report redraws them"


def test_every_table_that_has_results_is_shown_once() -> None:
    shown = [name for path in report.DOCUMENTS for _, name, _ in report.PLACE.findall(path.read_text())]
    assert len(set(shown)) == len(shown)
    assert set(shown) == set(report.TABLES)


class TestReport:
    @pytest.fixture
    def documents(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """Two documents, one of them up to date, and a table that they both have."""
        found = [tmp_path / "one.md", tmp_path / "two.md"]
        found[0].write_text("a\n<!-- table figure -->\nnew\n<!-- end -->\nb\n")
        found[1].write_text(
            "c\n<!-- table figure -->\nold\nold\n<!-- end -->\nd\n<!-- table figure -->\n<!-- end -->\n"
        )
        monkeypatch.setattr(report, "DOCUMENTS", found)
        monkeypatch.setattr(report, "TABLES", {"figure": lambda: "new\n"})
        return found

    def test_both_documents_are_filled_and_the_rest_stays(
        self, documents: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["report"])
        assert report.main() == 0
        table = "<!-- table figure -->\nnew\n<!-- end -->\n"
        assert [path.read_text() for path in documents] == [f"a\n{table}b\n", f"c\n{table}d\n{table}"]

    def test_check_tells_of_either_document_and_writes_none(
        self, documents: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["report", "--check"])
        before = [path.read_text() for path in documents]
        for order in (documents, documents[::-1]):
            monkeypatch.setattr(report, "DOCUMENTS", order)
            assert report.main() == 1
        assert [path.read_text() for path in documents] == before
        monkeypatch.setattr(report, "DOCUMENTS", documents[:1])
        assert report.main() == 0


class TestLosses:
    def test_they_are_the_longer_times_and_no_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A run of sizes as a range, one that rounds to 1.00 left out, wins never named."""

        def comparisons() -> Iterator[Comparison]:
            for place, times in (("1", 1.2), ("2", 1.004), ("4", 1.1), ("8", 1.3), ("1,024", 1.006), ("4,096", 0.5)):
                yield Comparison("head", "mdkern", "GEMM", place, times)
                yield Comparison("head", "mdkern", "peer", place, 0.9)
            yield Comparison("loops", "mdkern", "plain", "margin", 1.5)

        for name in [name for name in vars(report) if name.startswith("compare_")]:
            monkeypatch.setattr(report, name, lambda: iter(()))
        monkeypatch.setattr(report, "compare_samplers", comparisons)
        text = report.losses()
        assert text.startswith("5 of the 13 ")
        assert [line for line in text.splitlines() if line.startswith("|")][2:] == [
            "| head | mdkern | GEMM | 1, 4–1,024 rows | 1.01–1.30 |",
            "| loops | mdkern | plain | margin | 1.50 |",
        ]

    def test_every_pair_of_times_in_the_results_is_looked_at(self) -> None:
        """As many as the files have, ours against whatever stands beside it."""

        def rows_of(*names: str) -> list[dict[str, Any]]:
            return [row for name in names for row in json.loads((RESULTS / f"{name}.json").read_text())["table"]]

        table = rows_of("vocab_projection", "vocab_projection-cpu")
        timed = [{name for name, timing in row["ms"].items() if timing} for row in table]
        ours = {SAMPLED, GREEDY, MIXED}
        assert len(list(report.compare_projections())) == sum(len(names & ours) * len(names - ours) for names in timed)
        assert len(list(report.compare_selections())) == len(rows_of("select", "select-cpu"))
        rounded = rows_of("head-precision") if (RESULTS / "head-precision.json").exists() else []
        assert len(list(report.compare_head_precisions())) == 3 * len(rounded)
        parts = json.loads((RESULTS / "decoders.json").read_text())["parts"]
        expected = len(parts["size"]) + len(parts["pair"])
        expected += sum(row["way"] != "plain loop" for row in parts["llada"].values())
        expected += sum(not name.endswith(", none") for name in parts["caches"])
        assert len(list(report.compare_decoders())) == expected
        rows = json.loads((RESULTS / "diffusion-gemma.json").read_text())["rows"]
        texts = [{row["batch"] for row in rows if (row["way"] == "mdkern") == ours} for ours in (True, False)]
        assert len(list(report.compare_diffusion_gemma())) == len(set.intersection(*texts)) == 2

    def test_a_ratio_is_ours_over_theirs(self) -> None:
        found = next(entry for entry in report.compare_projections() if entry.theirs == GEMM)
        row = json.loads((RESULTS / "vocab_projection.json").read_text())["table"][0]["ms"]
        assert found.times == row[found.ours]["median"] / row[GEMM]["median"]
        parts = json.loads((RESULTS / "decoders.json").read_text())["parts"]
        for entry in report.compare_decoders():
            if entry.work.startswith("decoders"):
                case = parts["size" if "paper" in entry.work else "pair"][entry.place]
                assert entry.times == pytest.approx(case["ours"]["median"] / case["plain"]["run"]), entry
