"""The family of the study: its texts are shared out, its runs queued, and each has the shipped pair's recipe."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks.study import everything
from benchmarks.study.__main__ import build_parser as study_parser
from benchmarks.study.jobs import Job, remaining_cost, run_jobs
from benchmarks.study.runner import ORDER, PARTS
from benchmarks.study.setting import SIZES, load_study
from benchmarks.study.texts import deal, documents_of, prepare_texts
from benchmarks.study.train import build_parser, check, judge_job, main, model_job
from training import judge as judge_training
from training import train as training
from training.data import END_OF_TEXT, open_tokens
from training.options import check_arguments
from training.sizes import choose_sizes

STUDY = (Path(__file__).parents[2] / "docs" / "study.md").read_text()
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "it", "rain", "all", "day"]


def write_text(path: Path, documents: int) -> list[str]:
    """Documents of two paragraphs each, all different."""
    texts = [f"{' '.join(WORDS[i % 7 :])} {i}\n{' '.join(WORDS)} {i * i}" for i in range(documents)]
    path.write_text(f"\n{END_OF_TEXT}\n".join(texts) + "\n")
    return texts


class TestTexts:
    def test_each_document_goes_to_one_part(self, tmp_path: Path) -> None:
        """The last ones are held out, the others go to the models and the judge by turns."""
        data = [tmp_path / "a.txt", tmp_path / "b.txt"]
        texts = write_text(data[0], 60) + write_text(data[1], 41)
        parts = deal(data, tmp_path, tmp_path / "held-out.txt", judge=True)
        dealt = {name: documents_of(Path(path)) for name, [path] in parts.items()}
        assert documents_of(tmp_path / "held-out.txt") == texts[98:]
        assert dealt == {"train": texts[:98:2], "judge": texts[1:98:2]}
        assert deal(data, tmp_path, None, judge=False) == {"train": [str(tmp_path / "train.txt")]}
        assert documents_of(tmp_path / "train.txt") == texts

    def test_a_book_is_shared_out_by_paragraphs(self, tmp_path: Path) -> None:
        lines = [line for text in write_text(tmp_path / "a.txt", 20) for line in text.split("\n")]
        deal([tmp_path / "a.txt"], tmp_path, tmp_path / "held-out.txt", judge=False)
        assert documents_of(tmp_path / "train.txt") == lines[:39]
        assert documents_of(tmp_path / "held-out.txt") == lines[39:]

    def test_too_short_a_text_is_refused(self, tmp_path: Path) -> None:
        write_text(tmp_path / "a.txt", 1)
        with pytest.raises(ValueError, match="too few"):
            deal([tmp_path / "a.txt"], tmp_path, tmp_path / "held-out.txt", judge=True)

    def test_token_files_are_made_once_for_a_text(self, tmp_path: Path) -> None:
        text = tmp_path / "a.txt"
        write_text(text, 40)
        made = prepare_texts([text], tmp_path / "out", judge=True, vocab_size=300)
        assert made.judge is not None
        counts = [len(open_tokens(path)[0]) for path in (made.train, made.judge, made.valid)]
        assert min(counts) > 0
        before = made.train.stat().st_mtime_ns
        assert prepare_texts([text], tmp_path / "out", judge=True, vocab_size=300) == made
        assert made.train.stat().st_mtime_ns == before
        write_text(text, 60)
        prepare_texts([text], tmp_path / "out", judge=True, vocab_size=300)
        assert len(open_tokens(made.train)[0]) > counts[0]


class TestJobs:
    @staticmethod
    def job(folder: Path, name: str, cost: float, code: str = "", after: tuple[str, ...] = ()) -> Job:
        """Appends its beginning and end to a file, and leaves a result."""
        log, result = folder / "order", folder / name
        program = (
            f"import sys, pathlib, time; log = open({str(log)!r}, 'a', buffering=1); device = sys.argv[-1]\n"
            f"log.write('{name} begins ' + device + '\\n'); {code or 'pass'}\n"
            f"log.write('{name} ends ' + device + '\\n'); pathlib.Path({str(result)!r}).touch()"
        )
        keep = (folder / f"{name}.kept").touch
        return Job(name, (sys.executable, "-c", program), cost, result, folder / f"{name}.log", keep, after)

    def test_the_longest_first_and_one_at_a_time_on_a_device(self, tmp_path: Path) -> None:
        jobs = [self.job(tmp_path, name, cost) for name, cost in (("a", 1), ("b", 3), ("c", 2))]
        assert run_jobs(jobs, ["one"], lambda _: None) == []
        lines = (tmp_path / "order").read_text().split("\n")[:-1]
        assert lines == [f"{name} {what} one" for name in "bca" for what in ("begins", "ends")]
        assert all((tmp_path / f"{name}.kept").exists() for name in "abc")

    def test_devices_work_side_by_side(self, tmp_path: Path) -> None:
        """Each waits for the other's beginning."""
        wait = (
            f"[time.sleep(0.01) for _ in range(2000) if open({str(tmp_path / 'order')!r}).read().count('begins') < 2]"
        )
        jobs = [self.job(tmp_path, name, 1.0, wait) for name in "ab"]
        assert run_jobs(jobs, ["one", "two"], lambda _: None) == []
        lines = (tmp_path / "order").read_text().split("\n")[:-1]
        assert sorted(lines[:2]) == ["a begins one", "b begins two"]

    def test_a_gpu_is_the_only_one_that_its_job_sees(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = "log.write(__import__('os').environ['CUDA_VISIBLE_DEVICES'] + '\\n')"
        for visible, seen in (("5,7", "7"), ("", "1")):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
            run_jobs([self.job(tmp_path, f"on {seen}", 1.0, code)], ["cuda:1"], lambda _: None)
        lines = (tmp_path / "order").read_text().split("\n")
        assert lines[:6] == ["on 7 begins cuda", "7", "on 7 ends cuda", "on 1 begins cuda", "1", "on 1 ends cuda"]

    def test_one_that_fails_is_named_and_the_others_go_on(self, tmp_path: Path) -> None:
        said: list[str] = []
        jobs = [self.job(tmp_path, "bad", 2.0, "sys.exit('no room')"), self.job(tmp_path, "good", 1.0)]
        assert run_jobs(jobs, ["one"], said.append) == ["bad"]
        assert any(line.startswith("bad: not finished") and line.endswith("no room") for line in said)
        assert (tmp_path / "good.kept").exists()
        assert not (tmp_path / "bad.kept").exists()

    def test_what_others_wait_for_goes_first(self, tmp_path: Path) -> None:
        """a with what follows it takes 1 + 4; of the rest the longest first."""
        parts = (("d", 4, ("a", "c")), ("a", 1, ()), ("b", 3, ()), ("c", 0.5, ()))
        jobs = [self.job(tmp_path, name, cost, after=after) for name, cost, after in parts]
        assert remaining_cost(jobs) == {"a": 5, "b": 3, "c": 4.5, "d": 4}
        assert run_jobs(jobs, ["one"], lambda _: None) == []
        assert re.findall(r"(\w) begins", (tmp_path / "order").read_text()) == ["a", "c", "d", "b"]

    def test_what_waits_for_a_failure_is_not_run(self, tmp_path: Path) -> None:
        jobs = [self.job(tmp_path, "a", 1.0, "sys.exit(3)"), self.job(tmp_path, "b", 1.0, after=("a",))]
        assert run_jobs(jobs, ["one", "two"], lambda _: None) == ["a", "b"]
        assert "b begins" not in (tmp_path / "order").read_text()
        for after, message in ((("none",), "which is not there"), (("b",), "wait for each other")):
            with pytest.raises(ValueError, match=message):
                run_jobs([self.job(tmp_path, "b", 1.0, after=after)], ["one"], lambda _: None)

    def test_an_exit_code_of_0_may_be_the_result(self, tmp_path: Path) -> None:
        for code, missing in (("3", ["x"]), ("0", [])):
            job = Job("x", (sys.executable, "-c", f"exit({code})"), 1.0, tmp_path / "x.done", tmp_path / "x.log",
                      lambda: None, marks=True)  # fmt: skip
            assert run_jobs([job], ["one"], lambda _: None) == missing

    def test_what_is_done_is_not_run_again(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        assert run_jobs([self.job(tmp_path, "a", 1.0)], ["one"], lambda _: None) == []
        assert not (tmp_path / "order").exists()
        assert (tmp_path / "a.kept").exists()

    def test_jobs_end_with_their_queue(self, tmp_path: Path) -> None:
        pid = tmp_path / "pid"
        job = self.job(
            tmp_path, "a", 1.0, f"open({str(pid)!r}, 'w').write(str(__import__('os').getpid())); time.sleep(60)"
        )

        def say(_: str) -> None:
            while not (pid.exists() and pid.read_text()):
                pass
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_jobs([job], ["one"], say)
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def asked(tmp_path: Path, *options: str) -> argparse.Namespace:
    return build_parser().parse_args(["--out", str(tmp_path / "family"), "--data", "books.txt", *options])


class TestRecipe:
    def test_it_is_that_of_the_shipped_pair(self, tmp_path: Path) -> None:
        """The numbers of the model card."""
        text = tmp_path / "a.txt"
        write_text(text, 40)
        texts = prepare_texts([text], tmp_path / "family", vocab_size=300)
        job = model_job("12b", texts, asked(tmp_path))
        run = training.build_parser().parse_args([*job.command[3:], "--device", "cpu"])
        choose_sizes(run, 44_000_000, 1_000_000)
        check_arguments(run)
        assert (run.blocks, run.width, run.heads, run.mlp_ratio, run.length) == (12, 192, 3, 4, 256)
        assert (run.optimizer, run.muon_lr, run.lr, run.weight_decay) == ("muon", 6e-3, 4e-3, 0.05)
        assert (run.schedule, run.warmup, run.ema_decay, run.time_conditioning) == ("cosine", 300, 0.999, False)
        assert math.ceil(run.tokens / (run.batch_size * run.length)) == 15_412
        assert run.seed == 1
        assert model_job("12", texts, asked(tmp_path)).command != job.command

    def test_the_judge_sees_its_own_documents_a_few_times(self, tmp_path: Path) -> None:
        text = tmp_path / "a.txt"
        write_text(text, 40)
        texts = prepare_texts([text], tmp_path / "family", judge=True, vocab_size=300)
        assert texts.judge is not None
        job = judge_job(texts, asked(tmp_path))
        run = judge_training.build_parser().parse_args([*job.command[3:], "--device", "cpu"])
        assert run.data == texts.judge
        assert run.tokens == 8 * len(open_tokens(texts.judge)[0])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--models", "4", "big"], "named by their blocks"),
            (["--models", "4", "4"], "twice"),
            (["--width", "100"], "multiple"),
            (["--shipped", "--width", "384"], "shipped pair has --width 192"),
            (["--shipped", "--vocab-size", "512"], "leave out --vocab-size"),
            (["--shipped", "--models", "6"], "no effect"),
        ],
    )
    def test_what_cannot_work_is_refused(self, options: list[str], message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            check(asked(tmp_path, *options))


def test_the_command_for_everything_is_understood(tmp_path: Path) -> None:
    [command] = re.findall(
        r"^python -m benchmarks\.study\.everything (--[^#\n]*)", STUDY.replace("\\\n", ""), re.MULTILINE
    )
    asked = everything.build_parser().parse_args(shlex.split(command))
    assert (asked.size, len(asked.data), len(asked.second)) == ("full", 2, 1)


def test_the_documented_commands_are_understood() -> None:
    commands = re.findall(r"^python -m benchmarks\.study\.train (--[^#\n]*)", STUDY.replace("\\\n", ""), re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        check(build_parser().parse_args(shlex.split(command)))


@pytest.mark.slow
def test_a_family_from_text_to_study(tmp_path: Path) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "family"
    write_text(text, 400)
    options = ["--models", "1", "2b", "--width", "16", "--length", "20", "--tokens", "600", "--batch-size", "8"]
    command = ["--out", str(out), "--data", str(text), "--vocab-size", "280", *options, "--devices", "cpu"]
    assert main(command) == 0
    assert json.loads((out / "family.json").read_text())["held_out"]["2b"]["nelbo_nats_per_token"] > 0
    study = load_study(SIZES["tiny"], "cpu", out, data=out / "held-out.txt")
    assert (study.heavy, study.light) == ("2b", "1")
    assert main(command) == 0  # nothing is trained again


class TestEverything:
    @staticmethod
    def plan(tmp_path: Path, *options: str) -> dict[str, Job]:
        for name in ("books", "second"):
            write_text(tmp_path / f"{name}.txt", 400)
        asked = everything.build_parser().parse_args(
            ["--out", str(tmp_path), "--data", str(tmp_path / "books.txt"), *options]
        )
        return {job.name: job for job in everything.jobs_of(asked)[0]}

    def test_every_part_of_the_document_is_measured(self, tmp_path: Path) -> None:
        """With commands that the study understands, after what they need."""
        plan = self.plan(tmp_path, "--second", str(tmp_path / "second.txt"), "--wide")
        measured = {name: job for name, job in plan.items() if "benchmarks.study" in job.command}
        parsed = {name: study_parser().parse_args(job.command[3:]) for name, job in measured.items()}
        assert {part for call in parsed.values() for part in call.parts} == set(ORDER)
        for name, call in parsed.items():
            assert call.data == tmp_path / (f"{name}/held-out.txt" if name == "wikipedia" else "family/held-out.txt")
            needs = {other for part in call.parts for other in PARTS[part].needs}
            assert needs <= set(call.parts) or call.parts_of
            folder = None if call.models is None else call.models.name
            trained = {other for other in plan if other.startswith(f"{folder} ") and other not in measured}
            assert trained <= set(plan[name].after)
            assert folder is None or trained
        assert parsed["wikipedia"].judge == tmp_path / "wikipedia" / "judge"

    def test_the_full_one_is_that_of_the_document(self, tmp_path: Path) -> None:
        plan = self.plan(
            tmp_path, "--size", "full", "--held-out", str(tmp_path / "second.txt"), "--results", str(tmp_path)
        )
        [command] = re.findall(r"^python -m benchmarks\.study\.train (--out family [^\n]*)", STUDY, re.MULTILINE)
        recipe = build_parser().parse_args(shlex.split(command))
        taken = {"4", "12"} if recipe.shipped else set()
        assert {name for name in plan if re.fullmatch(r"family \d+b?", name)} == {
            f"family {name}" for name in recipe.models if name not in taken
        }
        run = training.build_parser().parse_args([*plan["family 8"].command[3:], "--device", "cpu"])
        assert (run.blocks, run.width, run.tokens) == (8, 192, 2.02e9)
        assert "shipped search" in plan["family measures"].after
        assert not (tmp_path / "family" / "12b").exists()

    def test_without_a_text_what_needs_none_is_measured(self, tmp_path: Path) -> None:
        asked = everything.build_parser().parse_args(["--out", str(tmp_path)])
        jobs, families = everything.jobs_of(asked)
        assert families == []
        assert not {part for job in jobs for part in job.command} & everything.NEED_TEXT
        assert {"hand_made", "search", "decoders", "routing"} < {part for job in jobs for part in job.command}

    def test_it_ends_with_what_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        said: list[str] = []
        monkeypatch.setattr(everything, "run_jobs", lambda jobs, *_: [jobs[-1].name])
        assert everything.main(["--out", str(tmp_path)], said.append) == 1
        assert said[-1].endswith("not finished: shipped others")
        with pytest.raises(SystemExit):
            everything.main(["--out", str(tmp_path), "--wide"])

    def test_evaluations_of_models_that_are_gone_are_kept(self, tmp_path: Path) -> None:
        def write(path: Path, held_out: dict[str, int]) -> None:
            path.write_text(json.dumps({"recipe": len(held_out), "held_out": held_out}))

        (tmp_path / "wide").mkdir()
        write(tmp_path / "wide" / "family.json", {"8": 8, "10": 1})
        write(tmp_path / "study-wide-training.json", {"6": 6, "10": 0})
        everything.keep_evaluations(tmp_path / "wide", tmp_path)
        found = json.loads((tmp_path / "study-wide-training.json").read_text())
        assert found == {"recipe": 2, "held_out": {"6": 6, "10": 1, "8": 8}}
