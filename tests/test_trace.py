"""The trace page: its data replays to the text, and no text can break it."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mdkern import DiT, DiTConfig, History, SampleOutput, pretrained, sample
from mdkern.trace import decode, render_trace, schedule_segments, text_units, trace_data, write_trace

HOSTILE = "</script><script>document.body.id='pwned'</script><!--<b>&amp; \"'\u2028\\u003c\n\tnaïve 😀 日本"
STEPS = 10


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(pretrained.FOLDER / "tokenizer")


@pytest.fixture(scope="module")
def hostile(tokenizer):
    """The hostile text as a sample: two given tokens, the others revealed in turn, one in the closing pass."""
    ids = torch.tensor([tokenizer.encode(HOSTILE)])
    step = torch.arange(ids.shape[1])[None] % STEPS
    step[:, :2], step[:, 7] = -1, STEPS
    model = torch.where(step < 0, -1, (step >= 5).long())
    nfe = {"L": torch.tensor([5]), "H": torch.tensor([6])}
    return SampleOutput(sequences=ids, nfe=nfe, history=History(step, model, ("L", "H"), STEPS))


@pytest.fixture(scope="module")
def random_output():
    """Samples of an untrained model over the byte-level vocabulary: many tokens are parts of characters."""
    torch.manual_seed(0)
    shape = {"max_length": 64, "num_blocks": 1, "width": 16, "num_heads": 2}
    model = DiT(DiTConfig(vocab_size=4096, mask_id=4095, **shape)).eval()
    return sample({"A": model, "B": model}, "A8 B8", num_samples=3, length=64, steps=16, seed=0, return_history=True)


def embedded(page: str) -> dict:
    """The page's data as a browser reads it: up to the first end of the script, whatever that is."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', page, re.DOTALL)[1])


def test_data_holds_each_tokens_id_step_and_model(random_output, tokenizer):
    data = embedded(render_trace(random_output, tokenizer))
    history = random_output.history
    for key, tensor in (("ids", random_output.sequences), ("step", history.step), ("model", history.model)):
        assert [sample[key] for sample in data["samples"]] == tensor.tolist()
    assert [data["models"], data["steps"]] == [["A", "B"], 16]
    assert [sample["nfe"] for sample in data["samples"]] == torch.stack(list(random_output.nfe.values()), 1).tolist()


def test_units_replay_to_the_text(random_output, hostile, tokenizer):
    for output in (random_output, hostile):
        data = embedded(render_trace(output, tokenizer))
        for shown, ids in zip(data["samples"], output.sequences.tolist()):
            assert "".join(text for text, _ in shown["units"]) == decode(tokenizer, ids)
            assert sum(count for _, count in shown["units"]) == len(ids)
    assert "".join(text for text, _ in data["samples"][0]["units"]) == HOSTILE


def test_units_are_single_tokens_except_for_split_characters(tokenizer):
    ids = tokenizer.encode("plain words, 😀 日.")
    units = text_units(ids, lambda part: decode(tokenizer, part))
    assert all(count == 1 for text, count in units if text.isascii())
    assert {text.strip(): count > 1 for text, count in units if not text.isascii()} == {"😀": True, "日": True}


def test_units_keep_spaces_that_a_decoder_drops_at_the_start():
    words = ["the", "cat", "sat"]
    units = text_units([0, 1, 2], lambda ids: " ".join(words[i] for i in ids))
    assert units == [("the", 1), (" cat", 1), (" sat", 1)]


def test_hostile_text_and_title_stay_data(hostile, tokenizer):
    title = "</title><script>alert(1)</script> __DATA__ \\1"
    page = render_trace(hostile, tokenizer, title=title)
    assert page.lower().count("<script") == 2
    assert page.lower().count("</script") == 2
    assert "<!--" not in page
    assert page.count(html.escape(title)) == 2
    assert embedded(page)["title"] == title


def test_page_asks_for_nothing_outside(hostile, tokenizer):
    page = render_trace(hostile, tokenizer)
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(", page)


def test_segments_are_the_schedules_or_read_off_the_history(random_output):
    history = random_output.history
    assert schedule_segments(history, "A8 B8") == [(0, 0, 8), (1, 8, 16)]
    assert schedule_segments(history, None) == [(0, 0, 8), (1, 8, 16)]  # 192 positions: every step has a reveal
    sparse = History(torch.tensor([[2, 7]]), torch.tensor([[1, 0]]), ("A", "B"), 16)
    assert schedule_segments(sparse, None) == [(1, 0, 7), (0, 7, 16)]


def test_what_follows_the_end_of_a_text_is_no_models(tokenizer):
    """Positions filled in after the end of text have the step at which that was, and no model."""
    config = DiTConfig(vocab_size=4096, mask_id=4095, eos_id=0, max_length=32, num_blocks=1, width=16, num_heads=2)
    model = DiT(config).eval()
    with torch.no_grad():
        model.head_bias[0] = 9.0
    options = {"decoder": "top_probability", "block_length": 8, "steps": 32, "stop_at_eos": True, "seed": 0}
    output = sample({"A": model, "B": model}, "A16 B16", length=32, return_history=True, **options)
    assert output.stop_reason == ["end_of_text"]
    (shown,) = embedded(render_trace(output, tokenizer))["samples"]
    assert shown["model"][8:] == [-1] * 24
    assert shown["step"][8:] == [max(shown["step"][:8])] * 24
    assert schedule_segments(output.history, None) == [(0, 0, 32)]  # and not a stretch by model -1


def test_an_adaptive_decoders_steps_are_shares_of_the_text(tokenizer):
    """A pass at which k of the n tokens were there has step k T / n, so that models change at their share."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(vocab_size=4096, mask_id=4095, max_length=24, num_blocks=1, width=16, num_heads=2)).eval()
    output = sample(
        {"A": model, "B": model}, "A3 B9", length=24, steps=12, decoder="threshold", seed=0, return_history=True
    )
    (shown,) = embedded(render_trace(output, tokenizer, schedule="A3 B9"))["samples"]
    for step, model_number in zip(shown["step"], shown["model"]):
        before = sum(other < step for other in shown["step"])
        assert before <= 24 * (step + 1) / 12
        assert model_number == (step >= 3)
    assert embedded(render_trace(output, tokenizer, schedule="A3 B9"))["segments"] == [[0, 0, 3], [1, 3, 12]]


def test_the_page_says_what_was_run(hostile, tokenizer):
    known = SampleOutput(**(hostile | {"seed": -(2**63)}))
    about = {"schedule": "L5 H5", "decoder": "threshold:threshold=0.9", "models": {"H": "12 blocks"}}
    data = embedded(render_trace(known, tokenizer, title="A walk", **about))
    assert (data["title"], data["decoder"]) == ("A walk", "threshold:threshold=0.9")
    assert data["seed"] == "-9223372036854775808"  # whole: a number of JavaScript would be rounded
    assert dict(zip(data["models"], data["described"])) == {"L": "light model", "H": "12 blocks"}
    with pytest.raises(TypeError, match="a trace has no titel: there is title, schedule, models, decoder"):
        render_trace(known, tokenizer, titel="A walk")


def test_output_without_history_is_refused(random_output, tokenizer):
    without = SampleOutput(sequences=random_output.sequences, nfe=random_output.nfe)
    with pytest.raises(ValueError, match="return_history=True"):
        trace_data(without, tokenizer)


def test_file_is_written_whole_or_not_at_all(hostile, tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "trace.html"
    write_trace(file, hostile, tokenizer)
    assert file.read_text() == render_trace(hostile, tokenizer)

    def failing(*_):
        raise OSError("disk full")

    monkeypatch.setattr("mdkern.trace.os.fsync", failing)
    with pytest.raises(OSError, match="disk full"):
        write_trace(file, hostile, tokenizer, title="new")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.html"]
    assert file.read_text() == render_trace(hostile, tokenizer)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def dump(file, tmp_path, where: str) -> str:
    """The page's elements as a browser leaves them."""
    quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    profile, address = f"--user-data-dir={tmp_path / 'profile'}", f"{file.as_uri()}#{where}"
    command = [BROWSER, "--headless", *quiet, profile, "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_browser_shows_what_follows_the_end_of_a_text(tokenizer, tmp_path):
    ids = torch.tensor([tokenizer.encode("She went home. It was dark.")])
    step, model = torch.zeros_like(ids), torch.zeros_like(ids)
    step[:, 3:], model[:, 3:] = 4, -1
    output = SampleOutput(sequences=ids, nfe={"A": torch.tensor([1])}, history=History(step, model, ("A",), 5))
    write_trace(tmp_path / "trace.html", output, tokenizer)
    rest = ids.shape[1] - 3
    assert dump(tmp_path / "trace.html", tmp_path, "step=3").count('class="unit masked') == rest
    assert dump(tmp_path / "trace.html", tmp_path, "step=4").count('class="unit revealed filled') == rest


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_browser_says_what_happened_at_a_step(tokenizer, tmp_path):
    """A model is said to have run only where it revealed something in this sample."""
    ids = torch.tensor([tokenizer.encode("She went home. It was dark.")])
    step, model = torch.zeros_like(ids), torch.zeros_like(ids)
    step[:, 2:], model[:, 2:] = 3, 1
    nfe, history = {"L": torch.tensor([1]), "H": torch.tensor([1])}, History(step, model, ("L", "H"), 6)
    output = SampleOutput(sequences=ids, nfe=nfe, seed=5, history=history)
    write_trace(tmp_path / "trace.html", output, tokenizer, schedule="L2 H4", decoder="margin")
    count = ids.shape[1]
    pages = {at: dump(tmp_path / "trace.html", tmp_path, f"step={at}") for at in (0, 1, 3, 4)}
    status = {at: re.search(r'role="status">(.*?)<', page)[1] for at, page in pages.items()}
    assert status == {
        0: f"step 0 of 0–5 · L reveals 2 tokens · 2 of {count} tokens revealed",
        1: f"step 1 of 0–5 · nothing revealed (L’s part of the schedule) · 2 of {count} tokens revealed",
        3: f"step 3 of 0–5 · H reveals {count - 2} tokens · {count} of {count} tokens revealed",
        4: f"step 4 of 0–5 · nothing revealed (H’s part of the schedule) · {count} of {count} tokens revealed",
    }
    about = re.search(r'<dl id="about">(.*?)</dl>', pages[0])[1]
    assert re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", about) == [
        ("L", "light model"),
        ("H", "heavy model"),
        ("schedule", "L2 H4"),
        ("decoder", "margin"),
        ("seed", "5"),
        ("forward passes", "2 for 6 steps: L 1, H 1"),
    ]


MEASURE = """<script>
const widths = [...document.querySelectorAll(".unit.masked")].map(
  box => box.getBoundingClientRect().width / box.style.getPropertyValue("--tokens"));
parent.postMessage(JSON.stringify([document.documentElement.scrollWidth, [...new Set(widths)]]), "*");
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_browser_shows_a_narrow_page_whole_and_masks_of_one_width(random_output, tokenizer, tmp_path):
    """In a frame of 390 pixels nothing sticks out, and no mask tells how long its token is."""
    page = render_trace(random_output, tokenizer, title="word " * 30)
    (tmp_path / "page.html").write_text(page.replace("</body>", MEASURE + "</body>"))
    listen = "<script>addEventListener('message', event => { document.title = event.data; });</script>"
    frame = "<iframe src='page.html#step=5' style='width: 390px; height: 800px; border: 0'></iframe>"
    (tmp_path / "frame.html").write_text(f"<title></title>{listen}{frame}")
    width, masks = json.loads(re.search(r"<title>(.*?)</title>", dump(tmp_path / "frame.html", tmp_path, ""))[1])
    assert width <= 390
    assert masks == [24]  # 1.5 rem


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize(("step", "status"), [(-1, "start"), (6, "step 6 of 0–9"), (10, "closing pass")])
def test_browser_shows_the_step_of_the_address(hostile, tokenizer, tmp_path, step, status):
    file = tmp_path / "trace.html"
    write_trace(file, hostile, tokenizer)
    dom = dump(file, tmp_path, f"sample=0&step={step}")
    assert f'role="status">{status}' in dom
    text = re.search(r'<div id="text">(.*?)</div>', dom, re.DOTALL)[1]
    assert html.unescape(re.sub(r"<[^>]*>", "", text)) == HOSTILE
    assert 'id="pwned"' not in dom
    shown, reveals, first = trace_data(hostile, tokenizer)["samples"][0], [], 0
    for _, count in shown["units"]:
        reveals.append(max(shown["step"][first : first + count]))
        first += count
    assert dom.count('class="unit masked') == sum(reveal > step for reveal in reveals)
    assert dom.count('class="unit given') == sum(reveal < 0 for reveal in reveals)
