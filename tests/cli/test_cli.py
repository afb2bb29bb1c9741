"""The command line: what goes where, what is refused, and that files are written whole or not at all."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import mdkern
from mdkern import DiT, DiTConfig, decoders, pretrained
from mdkern.cli import main as cli
from mdkern.engine import planned
from mdkern.models.tokenizers import load_tokenizer
from tests.problems.checkpoints import make_tokenizer, save
from tests.problems.hf_models import bert
from tests.problems.policies import random_policy

LENGTH = 24


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A two-block and a one-block model with the shipped tokenizer's vocabulary, as command-line options."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, blocks in (("heavy", 2), ("light", 1)):
        torch.manual_seed(blocks)
        shape = {"max_length": LENGTH, "num_blocks": blocks, "width": 16, "num_heads": 2, "tie_head": True}
        DiT(DiTConfig(vocab_size=4096, mask_id=4095, eos_id=0, **shape)).save_pretrained(folder / name)
    options = {"--heavy": folder / "heavy", "--light": folder / "light", "--tokenizer": pretrained.FOLDER / "tokenizer"}
    return [str(part) for option in options.items() for part in option]


@pytest.fixture
def run_alone(capsys):
    """Run ``mdkern sample`` with these options alone: (exit code, stdout, stderr)."""

    def run(*arguments: str):
        capsys.readouterr()
        try:
            code = cli.main(["sample", "--device", "cpu", *arguments])
        except SystemExit as stop:  # argparse's own way out
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def run(checkpoints, run_alone):
    """The same with the tiny models."""
    return lambda *arguments: run_alone(*checkpoints, *arguments)


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_text_on_stdout_and_summary_on_stderr(run, tmp_path):
    file = tmp_path / "out.jsonl"
    code, out, err = run("--num-samples", "2", "--seed", "7", "--schedule", "L6 H12 L6", "--output", str(file))
    assert code == 0
    first, second = records(file)
    assert out == f"--- sample 0 ---\n{first['text']}\n\n--- sample 1 ---\n{second['text']}\n"
    assert f"2 x {LENGTH} tokens, decoder ancestral, schedule L6 H12 L6, seed 7, cpu, float32" in err
    mean = {name: (first["nfe"][name] + second["nfe"][name]) / 2 for name in "LH"}
    assert f"L {mean['L']:.1f} (1 blocks), H {mean['H']:.1f} (2 blocks)" in err
    assert "25.0% of the blocks" in err  # equation (3): half of the steps with half of the blocks
    assert re.search(r"\d tokens/s", err)


def test_quiet_prints_the_text_alone(run):
    code, out, err = run("--quiet", "--seed", "1")
    assert code == 0
    assert err == ""
    assert out.endswith("\n")
    assert "---" not in out.splitlines()[0]


def test_history_says_when_and_by_which_model_each_token_came(run, tmp_path):
    file = tmp_path / "out.jsonl"
    run("--seed", "7", "--schedule", "L6 H12 L6", "--prompt", "He", "--output", str(file), "--history")
    (record,) = records(file)
    models = {step: "H" if 6 <= step < 18 else "L" for step in range(24)} | {24: "L", None: None}
    assert record["reveal_step"][0] is None
    assert record["reveal_model"] == [models[step] for step in record["reveal_step"]]
    assert [value is None for value in record["log_prob"]] == [step is None for step in record["reveal_step"]]
    assert all(value <= 0.0 for value in record["log_prob"] if value is not None)


def test_json_lines_hold_what_sample_returns(run, checkpoints, tmp_path):
    file = tmp_path / "out.jsonl"
    run("--num-samples", "3", "--seed", "5", "--temperature", "0.7", "--steps", "16", "--output", str(file))
    models = {"H": DiT.from_pretrained(checkpoints[1]), "L": DiT.from_pretrained(checkpoints[3])}
    schedule = mdkern.Schedule.sandwich(0.25)
    expected = mdkern.sample(models, schedule, num_samples=3, length=LENGTH, steps=16, temperature=0.7, seed=5)
    written = records(file)
    assert [record["token_ids"] for record in written] == expected.sequences.tolist()
    assert [record["nfe"] for record in written] == [
        {name: int(count[number]) for name, count in expected.nfe.items()} for number in range(3)
    ]
    assert [record["sample"] for record in written] == [0, 1, 2]
    assert {(record["seed"], record["schedule"]) for record in written} == {(5, "L2 H12 L2")}


def test_passes_of_the_block_cache_are_told_apart(run_alone, tmp_path):
    shape = {"max_length": LENGTH, "num_blocks": 1, "width": 16, "num_heads": 2, "tie_head": True, "block_causal": 8}
    DiT(DiTConfig(vocab_size=4096, mask_id=4095, eos_id=0, **shape)).save_pretrained(tmp_path / "model")
    model = ("--heavy", str(tmp_path / "model"), "--tokenizer", str(pretrained.FOLDER / "tokenizer"))
    options = ("--decoder", "threshold", "--cache", "block", "--output", str(tmp_path / "out.jsonl"))
    code, _, err = run_alone(*model, *options)
    assert code == 0
    (record,) = records(tmp_path / "out.jsonl")
    assert record["commits"] == {"H": 2}  # between three blocks
    assert f"{record['nfe']['H']}.0 for {LENGTH} steps, 2.0 of them for keys and values alone" in err


def test_same_seed_same_text(run):
    texts = [run("--quiet", "--seed", seed, "--batch-size", size)[1] for seed, size in ("31", "31", "42")]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_a_seed_of_its_own_is_told_and_gives_the_text_again(run):
    _, text, err = run()
    seed = re.search(r"seed (\d+)", err)[1]
    assert run("--seed", seed)[1] == text


def test_prompt_is_continued(run, tmp_path):
    file = tmp_path / "out.jsonl"
    code, out, _ = run("--prompt", "Once upon a time", "--output", str(file), "--num-samples", "2")
    assert code == 0
    assert out.count("Once upon a time") == 2
    assert [len(record["token_ids"]) for record in records(file)] == [LENGTH, LENGTH]


def test_placeholders_are_filled_in(run, tmp_path):
    file, tokenizer = tmp_path / "out.jsonl", load_tokenizer(str(pretrained.FOLDER / "tokenizer"))
    before, after = (tokenizer.encode(part) for part in ("She went", " home."))
    code, *_ = run("--prompt", "She went[MASK:5] home.", "--output", str(file))
    ids = records(file)[0]["token_ids"]
    assert code == 0
    assert ids[: len(before)] == before
    assert ids[len(before) + 5 :] == after  # not continued, as no --length was given
    run("--prompt", "She went[MASK:5] home.", "--output", str(file), "--length", "20")
    assert len(records(file)[0]["token_ids"]) == 20
    assert records(file)[0]["token_ids"][len(before) + 5 :][: len(after)] == after


def test_one_model_needs_no_schedule(run, checkpoints, capsys):
    code = cli.main(["sample", *checkpoints[2:], "--device", "cpu", "--seed", "0"])
    err = capsys.readouterr().err
    assert code == 0
    assert f"schedule L{LENGTH}," in err
    assert "saved" not in err


def test_an_output_layer_in_8_bits(run, checkpoints, tmp_path):
    """The command draws what `sample` draws with the same rounded output layers, and other tokens than without."""
    file = tmp_path / "out.jsonl"
    options = ["--schedule", "L6 H12 L6", "--seed", "3", "--num-samples", "2", "--output", str(file)]
    options += ["--temperature", "0.05"]  # as logits of random weights are small
    found = []
    for precision in ([], ["--head-precision", "fp8"]):
        code, _, err = run(*options, *precision)
        assert code == 0
        assert ("float32 (output layer in fp8)" in err) == bool(precision)
        found.append([record["token_ids"] for record in records(file)])
    models = (DiT.from_pretrained(checkpoints[place]) for place in (1, 3))
    heavy, light = (mdkern.adapt(model, head_precision="fp8") for model in models)
    shape = {"num_samples": 2, "length": LENGTH, "seed": 3, "temperature": 0.05, "progress": False}
    want = mdkern.sample(heavy, light, "L6 H12 L6", **shape)
    assert found[1] == want.sequences.tolist() != found[0]


def test_three_models(run, checkpoints):
    code, _, err = run("--model", f"m={checkpoints[1]}", "--schedule", "L8 M8 H8")
    assert code == 0
    assert re.search(r"L \S+ \(1 blocks\), M \S+ \(2 blocks\), H \S+ \(2 blocks\)", err)


def test_decoders_and_their_options(run, checkpoints, tmp_path):
    """What the command writes is what `sample` gives."""
    file = tmp_path / "out.jsonl"
    options = ["--block-length", "8", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.001", "--no-cuda-graphs"]
    options += ["--top-p-rule", "within"]
    decoder = "edit:mask_threshold=0.01,edit_threshold=0.02,closing_steps=2"
    code, _, err = run("--decoder", decoder, *options, "--seed", "3", "--output", str(file))
    assert code == 0
    assert f"decoder {decoder}" in err
    models = {"H": DiT.from_pretrained(checkpoints[1]), "L": DiT.from_pretrained(checkpoints[3])}
    expected = mdkern.sample(
        models, mdkern.Schedule.sandwich(0.25), length=LENGTH, steps=LENGTH, seed=3, block_length=8, top_k=50,
        top_p=0.9, top_p_rule="within", min_p=0.001, decoder=decoders.Edit(0.01, 0.02, 2),
    )  # fmt: skip
    (record,) = records(file)
    assert record["token_ids"] == expected.sequences[0].tolist()
    assert (record["decoder"], record["stop_reason"]) == (decoder, "all_revealed")


def test_steps_are_made_to_fit_the_blocks(run):
    code, _, err = run("--decoder", "margin", "--block-length", "7", "--prompt", "She")
    assert code == 0
    assert "schedule L4 H21 L3," in err  # 28 steps: four blocks of 7 take in the 23 positions after the prompt


def test_a_cache_goes_with_blocks(run):
    assert run("--decoder", "threshold", "--block-length", "8", "--cache", "dual")[0] == 0
    code, _, err = run("--decoder", "threshold", "--cache", "dual")
    assert code == 2
    assert "needs a block_length" in err


def test_steps_per_block(run, tmp_path):
    file = tmp_path / "out.jsonl"
    run("--steps-per-block", "2", "--block-length", "8", "--decoder", "random", "--output", str(file), "--seed", "0")
    (record,) = records(file)
    assert sum(record["nfe"].values()) == 2 * LENGTH // 8


def test_end_of_text_stops_a_sample(run, tmp_path, monkeypatch):
    """Token 0 is the end of text, and is made likely."""
    bias, file = DiT.suppressed_bias, tmp_path / "out.jsonl"
    monkeypatch.setattr(DiT, "suppressed_bias", lambda model: bias(model).index_fill(0, torch.tensor([0]), 9.0))
    run("--stop-at-eos", "--block-length", "8", "--decoder", "random", "--output", str(file), "--seed", "0")
    (record,) = records(file)
    assert record["stop_reason"] == "end_of_text"
    ids = record["token_ids"]
    assert ids[ids.index(0) :] == [0] * (LENGTH - ids.index(0))
    expected = load_tokenizer(str(pretrained.FOLDER / "tokenizer")).decode(ids[: ids.index(0)])
    assert record["text"] == expected, "the end of text and what follows are not printed"


def test_frequencies_are_read_off_a_text(run, tmp_path, monkeypatch):
    text = tmp_path / "reference.txt"
    text.write_text("one two one")
    seen = []
    monkeypatch.setattr(decoders.PositionAware, "fitted", lambda self, *_: seen.append(self) or self)
    run("--decoder", f"position_aware:lam=0.5,frequency={text}")
    ids = load_tokenizer(str(pretrained.FOLDER / "tokenizer")).encode("one two one")
    assert seen[0].lam == 0.5
    assert seen[0].frequency.sum() == pytest.approx(1.0)
    assert set(seen[0].frequency.nonzero()[:, 0].tolist()) == set(ids)


def test_every_decoder_has_a_trace(run, tmp_path):
    text = tmp_path / "reference.txt"
    text.write_text("one two one")
    random_policy(vocab_size=4096).save(tmp_path / "policy")
    needed = {"genmd4": ":exponents=2", "position_aware": f":frequency={text}", "learned": f":policy={tmp_path}/policy"}
    for name in decoders.DECODERS:
        file = tmp_path / f"{name}.html"
        options = ["--decoder", name + needed.get(name, ""), "--schedule", "L12 H12", "--trace", str(file)]
        options += ["--temperature", "0"] if getattr(decoders.DECODERS[name], "greedy", False) else []
        assert run(*options, "--length", "10", "--quiet")[0] == 0, name
        data = json.loads(re.search(r'id="data">(.*?)</script', file.read_text(), re.DOTALL)[1])
        (sample,) = data["samples"]
        assert min(sample["step"]) >= 0, name
        assert max(sample["step"]) <= 24
        assert set(sample["model"]) <= {0, 1}


def test_trace_is_written(run, tmp_path):
    file = tmp_path / "trace.html"
    title = "A walk & a talk"
    options = ["--schedule", "L12 H12", "--seed", "6", "--decoder", "first_hitting", "--num-samples", "3"]
    assert run("--trace", str(file), "--trace-title", title, *options, "--batch-size", "1")[0] == 0
    data = json.loads(re.search(r'id="data">(.*?)</script', file.read_text(), re.DOTALL)[1])
    assert data["segments"] == [[0, 0, 12], [1, 12, 24]]
    assert (data["title"], data["decoder"], data["seed"]) == (title, "first_hitting", "6")
    assert data["described"] == ["light model, 1 block of width 16", "heavy model, 2 blocks of width 16"]
    assert len(data["samples"]) == 3


BAD_INPUT = {
    "not a number": (["--steps", "many"], "--steps: must be a whole number of at least 1, not 'many'"),
    "no samples": (["--num-samples", "0"], "--num-samples: must be a whole number"),
    "unknown option": (["--stepz", "3"], "--stepz"),
    "name without a path": (["--model", "M="], "NAME=PATH"),
    "no such checkpoint": (["--model", "M=/no/such"], "model M cannot be loaded from /no/such"),
    "name taken": (["--model", "H=/no/such"], "different names"),
    "schedule too short": (["--schedule", "L1 H2", "--steps", "5"], "has 3 steps, but steps=5"),
    "unknown model": (["--schedule", "X24"], "names X"),
    "share beyond 1": (["--schedule", "sandwich:2"], "share in 0..1"),
    "too long": (["--length", "25"], "beyond the 24 positions"),
    "prompt too long": (["--prompt", "word " * 30], "tokens, but the models take 24"),
    "longer than asked": (["--prompt", "word " * 9, "--length", "5"], "tokens, but --length is 5"),
    "long and filled in": (["--prompt", "word " * 30 + "[MASK:1]"], "goes beyond the 24 positions"),
    "long with a mask": (["--prompt", "word " * 30 + "<|mask|>"], "tokens, but the models take 24"),
    "placeholder too long": (["--prompt", "a[MASK:999999999]"], "beyond the 24 positions"),
    "prompt fills all": (["--prompt", "a", "--length", "1"], "nothing is left to write"),
    "temperature": (["--temperature", "-1"], "temperature must be"),
    "unknown decoder": (["--decoder", "best"], "decoder 'best' is not known: there is ancestral"),
    "unknown parameter": (["--decoder", "margin:threshold=1"], "margin has no parameter 'threshold', there is"),
    "no parameters at all": (["--decoder", "random:a=1"], "random has no parameter 'a', it has none"),
    "parameter without a value": (["--decoder", "threshold:0.9"], "'0.9' must be KEY=VALUE"),
    "parameter twice": (["--decoder", "factor:factor=1,factor=2"], "factor is given twice"),
    "parameter out of range": (["--decoder", "threshold:threshold=2"], "threshold must lie in [0, 1], not 2"),
    "parameter not a number": (["--decoder", "threshold:threshold=high"], "threshold must lie in [0, 1], not 'high'"),
    "parameter left out": (["--decoder", "genmd4"], "genmd4 needs exponents, as in genmd4:exponents=2; it may be"),
    "numbers that are none": (["--decoder", "genmd4:exponents=[1,x]"], "[1,x] must hold numbers"),
    "no such numbers": (["--decoder", "genmd4:exponents=/no/such"], "/no/such cannot be read: /no/such: No such file"),
    "too few numbers": (["--decoder", "genmd4:exponents=[2,1]"], "exponents must be at least 24, one per position"),
    "parameter of another type": (["--decoder", "genmd4:exponents=many"], "--decoder genmd4:exponents=many"),
    "no reference text": (
        ["--decoder", "position_aware"],
        "needs frequency, as in position_aware:frequency=reference.txt;",
    ),
    "no such text": (["--decoder", "position_aware:frequency=/no/such"], "/no/such cannot be read"),
    "blocks that do not fit": (["--block-length", "8", "--steps", "7"], "multiple of the 3 blocks"),
    "no block": (["--block-length", "0"], "--block-length: must be a whole number"),
    "top-k": (["--top-k", "-1"], "top_k must be"),
    "top-p": (["--top-p", "0"], "top_p must be"),
    "min-p": (["--min-p", "2"], "min_p must be"),
    "not a device": (["--device", "abacus"], "not a device"),
    "no such GPU": (["--device", "cuda:99"], "there is no cuda:99"),
    "another accelerator": (["--device", "mps"], "--device mps: mdkern runs on cpu and cuda, not on mps"),
    "a device without memory": (["--device", "meta"], "--device meta: mdkern runs on cpu and cuda, not on meta"),
    "a GPU before the first": (["--device", "cuda:-1"], "--device cuda:-1 is not a device"),
    "more steps than can be": (["--steps", "9223372036854775808"], "must be a whole number of at most 2147483647"),
    "timeout": (["--timeout", "0"], "--timeout: must be a number of seconds above 0"),
    "timeout of one process": (["--timeout", "9"], "--timeout is for several processes"),
    "title without a page": (["--trace-title", "A"], "--trace-title goes with --trace"),
    "history of nothing": (["--history"], "--history goes with --output"),
    "resume from nothing": (["--resume"], "--resume goes with --output"),
    "resume a trace": (["--resume", "--output", "o", "--trace", "t"], "--resume and --trace do not go together"),
    "two prompts": (["--prompt", "a", "--prompt-file", "b"], "must not both be given"),
    "no such prompt": (["--prompt-file", "/no/such"], "--prompt-file /no/such cannot be read: No such file"),
    "prompt in Latin-1": (["--prompt", "caf\udce9"], "--prompt: has bytes that are no text in utf-8, from character 3"),
    "no folder": (["--output", "/no/such/out.jsonl"], "there is no folder /no/such"),
    "device file": (["--trace", "/dev/null"], "is not a file"),
    "same file": (["--output", "a.out", "--trace", "./a.out"], "are the same file"),
    "no tokenizer": (["--tokenizer", "/no/such"], "--tokenizer /no/such cannot be loaded"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(run, monkeypatch, arguments, message):
    monkeypatch.setattr(planned, "reveal_tick", lambda *_: pytest.fail("a forward pass was run"))
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("mdkern: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_model_of_transformers_with_its_tokenizer(run_alone, tmp_path):
    path = save(tmp_path / "bert", bert(), make_tokenizer())
    options = [
        "--length",
        "12",
        "--steps",
        "6",
        "--seed",
        "1",
        "--trace",
        str(tmp_path / "t.html"),
        "--prompt",
        "w8 w9",
    ]
    code, out, err = run_alone("--model", path, *options)
    assert (code, out.split()[:2]) == (0, ["w8", "w9"])
    assert "forward passes per sequence: H " in err
    assert "2 blocks of width 32" in (tmp_path / "t.html").read_text()
    other = save(tmp_path / "other", bert(), make_tokenizer(words=29))
    code, _, err = run_alone("--heavy", path, "--light", other, *options)
    assert code == 2
    assert "models must share their tokenizer, but the vocabulary of L is not that of H" in err


def test_options_of_models_go_with_models(run_alone):
    for option in (["--revision", "main"], ["--trust-remote-code"]):
        code, _, err = run_alone(*option)
        assert code == 2
        assert f"{option[0]} goes with --heavy, --light or --model" in err


def test_tokenizer_of_another_model_is_refused(run, checkpoints, tmp_path):
    config = DiTConfig(vocab_size=300, mask_id=299, max_length=LENGTH, num_blocks=1, width=16, num_heads=2)
    DiT(config).save_pretrained(tmp_path / "small")
    code, _, err = run("--model", f"S={tmp_path / 'small'}")
    assert code == 2
    assert "belongs to another model" in err


def test_checkpoints_need_a_tokenizer(checkpoints, capsys):
    assert cli.main(["sample", *checkpoints[:4]]) == 2
    assert "--tokenizer must be given" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(FloatingPointError("NaN"), 1), (KeyboardInterrupt(), 130)])
def test_a_failure_leaves_no_file(run, monkeypatch, tmp_path, error, code):
    old = tmp_path / "trace.html"
    old.write_text("old")

    def failing(*_, **__):
        raise error

    monkeypatch.setattr("mdkern.engine.planned.run_steps", failing)
    found, out, err = run("--output", str(tmp_path / "out.jsonl"), "--trace", str(old))
    assert found == code
    assert out == ""
    assert err.splitlines()[-1].startswith("mdkern: ")
    assert "Traceback" not in err
    assert [file.name for file in tmp_path.iterdir()] == ["trace.html"]
    assert old.read_text() == "old"


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"mdkern {mdkern.__version__}\n"


def test_the_shipped_pair_is_the_default(capsys):
    arguments = ["--device", "cpu", "--length", "16", "--steps", "8", "--seed", "0"]
    assert cli.main(["sample", *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "schedule L1 H6 L1" in err
    assert "(12 blocks)" in err


def test_a_tokenizers_own_code_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    trace = tmp_path / "it ran"
    (tmp_path / "own.py").write_text(f"open({str(trace)!r}, 'w')\nclass Own: ...\n")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match="needs code of its own, which is not run"):
        load_tokenizer(str(tmp_path))
    shutil.copy(pretrained.FOLDER / "tokenizer" / "tokenizer.json", tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == 4096
    assert not trace.exists()


def test_a_mistyped_tokenizer_is_no_request_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("asked the hub"))
    for name in ("runs/tokenizr", "./tokenizr", str(tmp_path / "x")):
        with pytest.raises(FileNotFoundError, match=f"no tokenizer at {re.escape(name)}"):
            load_tokenizer(name)


def test_the_shipped_tokenizer_pads():
    tokenizer = load_tokenizer(str(pretrained.FOLDER / "tokenizer"))
    padded = tokenizer(["one", "one two three"], padding=True)
    assert len(set(map(len, padded["input_ids"]))) == 1
    assert tokenizer.pad_token_id == 0
    assert padded["attention_mask"][0][-1] == 0
