"""`mdkern profile`: its samplers are samplers, its parts add up, bad input is refused before any work."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mdkern
from mdkern import Denoiser, SampleOutput, adapt
from mdkern.cli import main as cli
from mdkern.models import DiT
from mdkern.models.denoiser import Head
from mdkern.profiling import profile
from mdkern.profiling.compiled import Compiled, Wrapped, ddpm_compiled
from mdkern.profiling.profile import (
    Clock,
    Hollow,
    Profile,
    Setting,
    StepTimes,
    Unpadded,
    ddpm_autocast,
    plot,
    profile_model,
    random_dit,
    table,
    time_run,
    time_steps,
)
from tests.references.enumeration import MASK, ToyDenoiser, chi_square_p, exact_distribution

SETTING = Setting(batch_size=2, length=16, steps=8)


@pytest.fixture(scope="module")
def model() -> DiT:
    torch.manual_seed(0)
    return random_dit(2, "cpu", vocab_size=64, length=16, width=32, heads=2)


@pytest.mark.parametrize("prompt", [(MASK, MASK, MASK), (MASK, 2, MASK)])
def test_the_compiled_baseline_is_exact(prompt: tuple[int, ...]) -> None:
    """Its coin and its Gumbel-max have the distribution of the Markov chain, enumerated."""
    models = {"H": ToyDenoiser(1), "L": ToyDenoiser(2)}
    ids = torch.tensor([prompt]).expand(40_000, -1)
    drawn, passes = ddpm_compiled(
        {name: toy.denoiser() for name, toy in models.items()},
        "L1 H2 L1",
        input_ids=ids,
        steps=4,
        seed=0,
        backend="eager",
    )
    assert passes == {"L": 3, "H": 2}
    assert chi_square_p(drawn, exact_distribution(models, "LHHL", prompt, 1e-5)) > 1e-4


def test_the_compiled_baseline_leaves_the_random_state_alone(model: DiT) -> None:
    before = torch.get_rng_state()
    ddpm_compiled(Compiled(model, "eager"), num_samples=1, length=16, steps=2, seed=1, backend="eager")
    assert torch.equal(torch.get_rng_state(), before)


def test_compiled_hidden_states_are_those_of_the_model(model: DiT) -> None:
    ids = torch.randint(64, (2, 16))
    torch.testing.assert_close(Compiled(model, "eager").hidden(ids), model.hidden(ids))


def test_baselines_run_plain_pytorch(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model tells its plain form from its fast one, the baselines take the plain one."""
    monkeypatch.setattr(DiT, "plain_hidden", lambda self, ids, *_: torch.ones(*ids.shape, 32), raising=False)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    for baseline in (Unpadded(model), Compiled(model, "eager")):
        assert bool((baseline.hidden(ids) == 1).all())


def test_unpadded_head_has_the_same_logits(model: DiT) -> None:
    ids = torch.randint(64, (2, 16))
    logits = Unpadded(model).logits(ids)
    assert logits.shape[-1] == 64
    torch.testing.assert_close(logits, model(ids)[..., :64])


class Costly(Wrapped):
    """A denoiser whose backbone takes a second of a clock of its own."""

    now, passes = 0.0, 0

    def hidden(self, *arguments: Any, **options: Any) -> torch.Tensor:
        self.now += 1.0
        self.passes += 1
        return super().hidden(*arguments, **options)


def test_a_step_is_cut_into_backbone_and_head(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    costly, plain = Costly(adapt(model)), Head.logits

    def logits(head: Head, hidden: torch.Tensor) -> torch.Tensor:
        costly.now += 0.25
        return plain(head, hidden)

    monkeypatch.setattr(Head, "logits", logits)
    monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: costly.now))
    times = time_steps(ddpm_autocast, costly, SETTING, 5)
    assert times == StepTimes([1.0] * 5, [0.25] * 5, closing=0.25)


def test_whole_runs_are_told_apart_by_what_they_lack(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone, the head's columns and all the rest cost what they are made to cost."""
    costly = Costly(adapt(model))

    def sample(denoiser: Denoiser, **options: Any) -> SampleOutput:
        output = mdkern.sample(denoiser, **options)
        assert denoiser.head.weight is not None
        costly.now += 3.0 + 10.0 * (len(denoiser.head.weight) > 8)
        return output

    monkeypatch.setattr(profile, "FEW_COLUMNS", 8)
    monkeypatch.setattr(profile, "sample", sample)
    monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: costly.now))
    found = profile.profile_mdkern("", costly, SETTING, repeats=1)
    assert (found.head, found.other) == (10.0, 3.0)
    assert found.backbone == costly.passes / 2  # the warm-up's run is the same
    assert 0 < found.backbone <= 2 * (SETTING.steps + 1)


def test_a_clock_gives_the_time_between_marks() -> None:
    clock = Clock(torch.device("cpu"))
    clock.marks = [("backbone", 0.0), ("head", 2.0), ("backbone", 3.0), ("head", 7.0), ("end", 7.5)]
    assert clock.laps("backbone") == [2.0, 4.0]
    assert clock.laps("head") == [1.0, 0.5]


def test_a_model_is_timed_on_its_own_device(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever device is current."""
    device, waited, streams = torch.device("cuda", 1), [], []
    denoiser = Wrapped(adapt(model))
    denoiser.device = device
    done = SimpleNamespace(sequences=torch.zeros(1, 1))
    monkeypatch.setattr(profile, "sample", lambda *_, **__: done)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    monkeypatch.setattr(
        torch.cuda, "Event", lambda **_: SimpleNamespace(record=lambda stream=None: streams.append(stream))
    )
    assert time_run(denoiser, SETTING)[1] is time_run({"H": denoiser}, SETTING)[1] is done
    assert waited == [device] * 4  # before and after each
    Clock(device).mark("backbone")
    assert streams == [device]


def test_a_run_is_its_steps_and_the_closing_pass() -> None:
    times = StepTimes(backbone=[2.0, 3.0, 4.0], head=[1.0, 1.0, 1.0], closing=0.5)
    assert times.median_step() == 4.0
    assert times.run(10) == 10 * 4.0 + 3.0 + 0.5
    whole = profile.profile_loop("m", "eager", times, 10)
    assert whole.total == pytest.approx(times.run(10))
    assert whole.backbone == 11 * 3.0


def test_hollow_denoiser_fits_what_the_sampler_asks(model: DiT) -> None:
    denoiser = adapt(model)
    hollow = Hollow(denoiser, 2, 16, columns=32)
    ids, positions = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    assert hollow.hidden(ids).shape == denoiser.hidden(ids).shape
    assert hollow.hidden(ids[:1], None, positions).shape == denoiser.hidden(ids[:1], None, positions).shape
    assert hollow.head.weight is not None
    assert hollow.head.weight.shape == (32, 32)


def test_every_sampler_is_profiled(model: DiT) -> None:
    found = list(profile_model("2 blocks", model, SETTING, timed_steps=3, repeats=1, backend="eager"))
    assert [part.sampler for part in found] == ["eager", "compiled", "mdkern"]
    assert all(part.total > 0 for part in found)
    assert next(model.parameters()).dtype == torch.float32


def test_a_baseline_that_cannot_run_is_left_out(
    model: DiT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(profile, "ddpm_compiled", failing)
    found = list(profile_model("2 blocks", model, SETTING, timed_steps=1, repeats=1))
    assert [part.sampler for part in found] == ["eager", "mdkern"]
    assert caplog.messages == ["2 blocks, compiled is left out: no compiler"]


PROFILES = [Profile("12 blocks", "eager", 6.0, 3.0, 1.0, "20 steps"), Profile("12 blocks", "mdkern", 1.0, 0.5, 0.5, "")]


def test_table_and_plot(tmp_path: Path) -> None:
    lines = table(PROFILES).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == [
        "12",
        "blocks",
        "eager",
        "6",
        "s",
        "60.0%",
        "3",
        "s",
        "30.0%",
        "1",
        "s",
        "10.0%",
        "10",
        "s",
        "20",
        "steps",
    ]
    plot(PROFILES, tmp_path / "p.png", "title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "p.svg").write_text("old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        plot(PROFILES, tmp_path / "p.svg", "title")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.fixture
def run(model: DiT, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``mdkern profile`` with the tiny model and nothing compiled: (exit code, stdout, stderr)."""
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(profile, "profile_model", partial(profile_model, backend="eager"))
    size = ["--device", "cpu", "--steps", "4", "--batch-size", "1", "--timed-steps", "1", "--repeats", "1"]

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(["profile", "--heavy", str(tmp_path / "model"), *size, *arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def test_command(run: Any, tmp_path: Path) -> None:
    code, out, err = run("--output", str(tmp_path / "profile.png"))
    assert code == 0
    assert out.startswith("1 x 16 tokens in 4 steps, cpu, ")
    assert [line.split()[2] for line in out.splitlines()[3:]] == ["eager", "compiled", "mdkern"]
    assert err.count("2 blocks, ") == 3
    assert (tmp_path / "profile.png").stat().st_size > 0


def test_command_writes_json(run: Any) -> None:
    code, out, _ = run("--json")
    assert code == 0
    found = json.loads(out)["profiles"]
    assert [part["sampler"] for part in found] == ["eager", "compiled", "mdkern"]
    for part in found:
        assert part["total"] == pytest.approx(part["backbone"] + part["head"] + part["other"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "2"], "--blocks is for random weights"),
        (["--vocab-size", "99"], "--vocab-size goes with --blocks"),
        (["--output", "profile.txt"], "must end in .png"),
        (["--output", "/no/such/p.png"], "there is no folder"),
        (["--light", "/no/such"], "cannot be loaded"),
        (["--length", "17"], "at most 16"),
        (["--device", "abacus"], "not a device"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Any, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("mdkern: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_plot_needs_matplotlib(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    code, _, err = run("--output", "p.png")
    assert code == 2
    assert "pip install 'mdkern[plots]'" in err
