"""Checkpoints: our own layout there and back, and MDLM's against an independent implementation of its architecture."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mdkern import DiT
from mdkern.models import DiTConfig, checkpoint, load_dit, load_mdlm

MakeDiT = Callable[..., DiT]
VOCAB, WIDTH, HEADS, COND, LENGTH = 517, 24, 3, 20, 12


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def assert_same(one: DiT, other: DiT) -> None:
    assert one.config == other.config
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        if ours[name].shape[0] == one.config.padded_vocab_size:  # the padding is not part of the model
            assert torch.equal(ours[name][: one.config.vocab_size], theirs[name][: one.config.vocab_size])
        else:
            assert torch.equal(ours[name], theirs[name])
    ids, t = torch.arange(12)[None] % one.config.vocab_size, torch.tensor([0.4])
    mine, yours = one(ids, t), other(ids, t)
    assert mine.isneginf().equal(yours.isneginf())
    finite = mine.isfinite()
    # Not bit for bit: where a tensor lies in memory changes the order of the sums.
    rounding = 1e-5 if ours["embedding"].dtype == torch.float32 else 1e-2
    assert (mine - yours)[finite].norm() <= rounding * yours[finite].norm()


class TestOurLayout:
    @pytest.mark.parametrize("tie_head", [False, True])
    @pytest.mark.parametrize("time", [{}, {"time_conditioning": True, "cond_dim": 12}])
    @pytest.mark.parametrize("vocab", [11, 128, 517])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_there_and_back(
        self, make_dit: MakeDiT, tmp_path: Path, tie_head: bool, time: dict[str, Any], vocab: int, dtype: torch.dtype
    ) -> None:
        model = make_dit(vocab_size=vocab, mask_id=vocab - 1, eos_id=0, tie_head=tie_head, **time).to(dtype)
        model.save_pretrained(tmp_path / "model")
        assert_same(DiT.from_pretrained(tmp_path / "model"), model)
        loaded = DiT.from_pretrained(tmp_path / "model")
        assert (loaded.head_weight is loaded.embedding) == tie_head
        assert not loaded.training
        assert all(parameter.requires_grad for parameter in loaded.parameters())

    def test_files_hold_no_padding_and_no_second_head(self, make_dit: MakeDiT, tmp_path: Path) -> None:
        model = make_dit(tie_head=True).to(torch.bfloat16)
        model.save_pretrained(tmp_path / "model")
        assert listing(tmp_path) == ["config.json", "model", "model.safetensors"]
        weights = load_file(tmp_path / "model" / "model.safetensors")
        assert "head_weight" not in weights
        assert weights["embedding"].shape == (11, 16)
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        unpadded = sum(p.numel() for p in model.parameters()) - (128 - 11) * (16 + 1)
        assert sum(weight.numel() for weight in weights.values()) == unpadded

    def test_dtype_can_be_chosen_on_loading(self, make_dit: MakeDiT, tmp_path: Path) -> None:
        model = make_dit(tie_head=True)
        model.save_pretrained(tmp_path / "model")
        loaded = DiT.from_pretrained(tmp_path / "model", torch.bfloat16)
        assert_same(loaded, model.to(torch.bfloat16))
        assert loaded.head_weight is loaded.embedding

    def test_a_file_beside_its_config_is_enough(self, make_dit: MakeDiT, tmp_path: Path) -> None:
        model = make_dit(num_heads=4, time_conditioning=True)
        model.save_pretrained(tmp_path)
        assert_same(DiT.from_pretrained(tmp_path / "model.safetensors"), model)

    def test_sharded(self, make_dit: MakeDiT, tmp_path: Path) -> None:
        model = make_dit(vocab_size=200)
        model.save_pretrained(tmp_path / "model", max_shard_size="8KB")
        assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
        assert_same(DiT.from_pretrained(tmp_path / "model"), model)
        next((tmp_path / "model").glob("model-00002*.safetensors")).unlink()
        with pytest.raises(FileNotFoundError, match="lacks model-00002"):
            DiT.from_pretrained(tmp_path / "model")

    @pytest.mark.parametrize("sizes", [("5GB", "8KB"), ("8KB", "5GB"), ("4KB", "8KB"), ("8KB", "4KB")])
    def test_saving_over_an_older_checkpoint_replaces_all_of_it(
        self, make_dit: MakeDiT, tmp_path: Path, sizes: tuple[str, str]
    ) -> None:
        """However the two are sharded; other people's files stay."""
        old, new = make_dit(seed=1, num_blocks=3), make_dit(seed=2)
        (tmp_path / "README.md").write_text("mine")
        old.save_pretrained(tmp_path, sizes[0])
        new.save_pretrained(tmp_path, sizes[1])
        assert_same(DiT.from_pretrained(tmp_path), new)
        named = json.loads((tmp_path / "model.safetensors.index.json").read_text()) if sizes[1] != "5GB" else {}
        kept = set(named.get("weight_map", {"": "model.safetensors"}).values())
        assert {path.name for path in tmp_path.glob("*.safetensors")} == kept
        assert (tmp_path / "README.md").read_text() == "mine"

    def test_nothing_is_left_when_writing_fails(
        self, make_dit: MakeDiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A full disk while the weights are written: no folder, or the older checkpoint as it was."""

        def disk_full(state: Any, folder: Path, **_: Any) -> None:
            (Path(folder) / "model.safetensors").write_bytes(b"half a file")
            raise OSError("no space left on device")

        old = make_dit(seed=1)
        old.save_pretrained(tmp_path / "old")
        before = listing(tmp_path)
        monkeypatch.setattr("huggingface_hub.save_torch_state_dict", disk_full)
        for name in ("old", "new"):
            with pytest.raises(OSError, match="no space"):
                make_dit(seed=2).save_pretrained(tmp_path / name)
        assert listing(tmp_path) == before
        assert_same(DiT.from_pretrained(tmp_path / "old"), old)

    @pytest.mark.parametrize("reached", ["model-00001", "model-00002", "model.safetensors.index.json", "config.json"])
    def test_a_mixture_of_two_checkpoints_does_not_load(
        self, make_dit: MakeDiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached: str
    ) -> None:
        """Killed before one of the moves at the end: never the new weights with the old config, nor half of each."""
        make_dit(seed=1, num_heads=2).save_pretrained(tmp_path / "model", "8KB")
        move = os.replace

        def killed(source: Path, target: Path) -> None:
            if source.name.startswith(reached):
                raise KeyboardInterrupt
            move(source, target)

        monkeypatch.setattr(checkpoint.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            make_dit(seed=2, num_heads=4).save_pretrained(tmp_path / "model", "8KB")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no temporary folder left
        with pytest.raises((ValueError, FileNotFoundError)):
            DiT.from_pretrained(tmp_path / "model")

    def test_missing_files_are_named(self, make_dit: MakeDiT, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
            DiT.from_pretrained(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="safetensors"):
            DiT.from_pretrained(tmp_path)
        make_dit().save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="safetensors"):
            DiT.from_pretrained(tmp_path)

    @pytest.mark.parametrize("tie_head", [False, True])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda weights: weights.pop("norm_final.weight"), r"missing \['norm_final.weight'\]"),
            (lambda weights: weights.pop("embedding"), r"missing \['embedding'\]"),
            (lambda weights: weights.update(extra=torch.ones(2)), r"not expected \['extra'\]"),
            (lambda weights: weights.update(embedding=torch.ones(12, 16)), r"\(12, 16\), the config wants \(11, 16\)"),
            (lambda weights: weights.update(head_bias=torch.ones(11, 1)), r"\(11, 1\), the config wants \(11,\)"),
            (lambda weights: weights.update({"norm_final.weight": torch.ones(8)}), r"\(8,\), the config wants \(16,\)"),
        ],
    )
    def test_weights_that_do_not_fit_the_config(
        self,
        make_dit: MakeDiT,
        tmp_path: Path,
        change: Callable[[dict[str, Tensor]], Any],
        message: str,
        tie_head: bool,
    ) -> None:
        make_dit(tie_head=tie_head).save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            DiT.from_pretrained(tmp_path)

    def test_bad_files_are_named(self, make_dit: MakeDiT, tmp_path: Path) -> None:
        make_dit().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"flavour": 3}))
        with pytest.raises(ValueError, match=r"config\.json .* does not describe a DiT: .*flavour"):
            DiT.from_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config))
        whole = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole file"):
            DiT.from_pretrained(tmp_path)


class TheirLayerNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), x.shape[-1:]) * self.weight


class TheirEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(VOCAB, WIDTH))


class TheirTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, COND), nn.SiLU(), nn.Linear(COND, COND))

    def forward(self, sigma: Tensor) -> Tensor:
        frequency = torch.tensor([math.exp(-math.log(10_000) * i / 128) for i in range(128)])
        angle = sigma[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class TheirRotary(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10_000 ** (torch.arange(0, dim, 2).float() / dim)))


class TheirBlock(nn.Module):
    """Submodules in MDLM's order, which is the order of its EMA's list."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = TheirLayerNorm(WIDTH)
        self.attn_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attn_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm2 = TheirLayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))
        self.adaLN_modulation = nn.Linear(COND, 6 * WIDTH)

    def forward(self, x: Tensor, c: Tensor, inv_freq: Tensor) -> Tensor:
        batch, length, _ = x.shape
        modulation = self.adaLN_modulation(c).view(batch, 6, 1, WIDTH)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.unbind(1)
        qkv = self.attn_qkv(self.norm1(x) * (1 + scale_msa) + shift_msa)
        q, k, v = qkv.view(batch, length, 3, HEADS, WIDTH // HEADS).unbind(2)  # 'b s (three h d)'
        angle = torch.arange(length)[:, None, None] * torch.cat([inv_freq, inv_freq])  # [s, 1, d]

        def rotated(x: Tensor) -> Tensor:
            left, right = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
            return x * angle.cos() + torch.cat([-right, left], dim=-1) * angle.sin()

        scores = torch.einsum("bqhd,bkhd->bhqk", rotated(q), rotated(k)) / math.sqrt(WIDTH // HEADS)
        attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(batch, length, WIDTH)
        x = x + gate_msa * self.attn_out(attended)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class TheirOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_final = TheirLayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, VOCAB)
        self.adaLN_modulation = nn.Linear(COND, 2 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class TheirBackbone(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.vocab_embed = TheirEmbedding()
        self.sigma_map = TheirTime()
        self.rotary_emb = TheirRotary(WIDTH // HEADS)
        self.blocks = nn.ModuleList(TheirBlock() for _ in range(blocks))
        self.output_layer = TheirOutput()

    def forward(self, ids: Tensor, sigma: Tensor) -> Tensor:
        x = self.vocab_embed.embedding[ids]
        c = F.silu(self.sigma_map(sigma))
        for block in self.blocks:
            x = block(x, c, self.rotary_emb.inv_freq)
        return self.output_layer(x, c)


class MDLM(nn.Module):
    """MDLM's denoiser as its paper and public code describe it, float32, every parameter random and none zero."""

    def __init__(self, seed: int, blocks: int = 2) -> None:
        super().__init__()
        self.backbone = TheirBackbone(blocks)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 and "embedding" not in name else 4
            nn.init.normal_(parameter, 0.0, fan_in**-0.5, generator=generator)
            assert (parameter != 0).all()

    @torch.no_grad()
    def logits(self, ids: Tensor, t: Tensor, time_conditioning: bool) -> Tensor:
        sigma = -torch.log1p(-(1 - 1e-3) * t) if time_conditioning else torch.zeros_like(t)
        return self.backbone(ids, sigma)

    def config(self, time_conditioning: bool = False) -> dict[str, Any]:
        """The fields of the ``config.json`` of kuleshov-group/mdlm-owt."""
        sizes = {"vocab_size": VOCAB, "model_length": LENGTH, "hidden_dim": WIDTH, "cond_dim": COND}
        depth = {"n_blocks": len(self.backbone.blocks), "n_heads": HEADS, "dropout": 0.1}
        return {"model_type": "mdlm", **sizes, **depth, "time_conditioning": time_conditioning}

    def write(self, folder: Path, time_conditioning: bool = False, **changes: Any) -> Path:
        folder.mkdir(exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config(time_conditioning) | changes))
        return folder


def assert_logits_of(ours: DiT, theirs: MDLM, time_conditioning: bool) -> None:
    """Equal to float32 rounding, at every id but the mask, which MDLM's parameterisation excludes too."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (3, LENGTH), generator=generator)
    t = torch.tensor([1.0, 0.37, 1e-3])
    want = theirs.logits(ids, t, time_conditioning)
    mask_id = ours.config.mask_id
    assert want.std() > 0.3
    for got in (ours(ids, t), ours.logits(ours.hidden(ids, t, torch.arange(LENGTH).expand(3, -1)))):
        assert (got[..., mask_id] == -torch.inf).all()
        kept = torch.arange(VOCAB) != mask_id
        torch.testing.assert_close(got[..., :VOCAB][..., kept], want[..., kept], rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module")
def mdlm() -> MDLM:
    return MDLM(seed=0)


def lightning(raw: MDLM, averaged: MDLM | None, **more: Any) -> dict[str, Any]:
    """What MDLM's training writes: raw weights, and the EMA as a list in the order of the parameters."""
    content = {"epoch": 3, "global_step": 7, "state_dict": raw.state_dict(), **more}
    if averaged is not None:
        shadow = [parameter.detach().clone() for parameter in averaged.backbone.parameters()]
        content["ema"] = {"decay": 0.9999, "num_updates": 7, "shadow_params": shadow}
    return content


class RunSettings:
    """Stands for the settings and the tokenizer in a Lightning checkpoint: classes that the reader may not have."""

    def __init__(self) -> None:
        self.model = {"length": 12}

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["MDKERN_TEST_TRACE"],))  # unpickled as it is, this would leave a folder


class TestTheirLayout:
    @pytest.mark.parametrize("time_conditioning", [False, True])
    def test_safetensors(self, mdlm: MDLM, tmp_path: Path, time_conditioning: bool) -> None:
        model = load_dit(mdlm.write(tmp_path, time_conditioning))
        assert_logits_of(model, mdlm, time_conditioning)
        config = model.config
        assert (config.vocab_size, config.mask_id, config.padded_vocab_size) == (VOCAB, VOCAB - 1, 640)
        assert (config.max_length, config.num_blocks, config.num_heads) == (LENGTH, 2, HEADS)
        assert (config.time_conditioning, config.tie_head) == (time_conditioning, False)
        assert_logits_of(load_dit(tmp_path / "model.safetensors"), mdlm, time_conditioning)  # the config is beside it

    @pytest.mark.parametrize("time_conditioning", [False, True])
    def test_bin(self, mdlm: MDLM, tmp_path: Path, time_conditioning: bool) -> None:
        torch.save(mdlm.state_dict(), tmp_path / "pytorch_model.bin")
        torch.save({"lr": torch.tensor(3e-4)}, tmp_path / "training_args.bin")  # as trainers leave beside it
        (tmp_path / "config.json").write_text(json.dumps(mdlm.config(time_conditioning)))
        assert_logits_of(load_dit(tmp_path), mdlm, time_conditioning)

    def test_sharded_by_an_index(self, mdlm: MDLM, tmp_path: Path) -> None:
        state = mdlm.state_dict()
        names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
        weight_map = {name: names[index % 2] for index, name in enumerate(state)}
        for file in names:
            save_file({name: state[name] for name in state if weight_map[name] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        save_file({"backbone.stray": torch.ones(1)}, tmp_path / "another.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(mdlm.config()))
        assert_logits_of(load_dit(tmp_path), mdlm, False)

    @pytest.mark.parametrize("time_conditioning", [False, True])
    def test_lightning_gives_the_ema(self, mdlm: MDLM, tmp_path: Path, time_conditioning: bool) -> None:
        averaged = MDLM(seed=1)
        torch.save(lightning(mdlm, averaged), tmp_path / "best.ckpt")
        settings = mdlm.config(time_conditioning)
        assert_logits_of(load_mdlm(tmp_path / "best.ckpt", settings), averaged, time_conditioning)
        torch.save(lightning(mdlm, None), tmp_path / "best.ckpt")
        assert_logits_of(load_mdlm(tmp_path / "best.ckpt", settings), mdlm, time_conditioning)
        torch.save(lightning(mdlm, None, ema=None), tmp_path / "best.ckpt")
        assert_logits_of(load_mdlm(tmp_path / "best.ckpt", settings), mdlm, time_conditioning)

    def test_ema_entries_after_the_backbones_are_the_noise_schedules(self, mdlm: MDLM, tmp_path: Path) -> None:
        averaged = MDLM(seed=1)
        content = lightning(mdlm, averaged)
        content["ema"]["shadow_params"].append(torch.ones(1))
        content["state_dict"]["noise.sigma_max"] = torch.ones(1)
        torch.save(content, tmp_path / "best.ckpt")
        assert_logits_of(load_mdlm(tmp_path / "best.ckpt", mdlm.config()), averaged, False)

    @pytest.mark.parametrize("legacy", [False, True])
    def test_reading_a_checkpoint_runs_none_of_its_code(
        self, mdlm: MDLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
    ) -> None:
        """And needs none of its classes."""
        trace = tmp_path / "it ran"
        monkeypatch.setenv("MDKERN_TEST_TRACE", str(trace))
        content = lightning(mdlm, None, hyper_parameters={"config": RunSettings(), "steps": torch.Size([3])})
        torch.save(content, tmp_path / "best.ckpt", _use_new_zipfile_serialization=not legacy)
        assert_logits_of(load_mdlm(tmp_path / "best.ckpt", mdlm.config()), mdlm, False)
        assert not trace.exists()
        pickle.loads(pickle.dumps(RunSettings()))
        assert trace.exists()  # it would have

    def test_ema_that_does_not_line_up_is_refused(self, mdlm: MDLM, tmp_path: Path) -> None:
        for spoil in (lambda shadow: shadow.pop(), lambda shadow: shadow.insert(3, shadow.pop(9))):
            content = lightning(mdlm, MDLM(seed=1))
            spoil(content["ema"]["shadow_params"])
            torch.save(content, tmp_path / "best.ckpt")
            with pytest.raises(ValueError, match="EMA parameters do not line up"):
                load_dit(tmp_path / "best.ckpt")

    @pytest.mark.parametrize("time_conditioning", [False, True])
    def test_bfloat16(self, mdlm: MDLM, tmp_path: Path, time_conditioning: bool) -> None:
        rounded = MDLM(seed=0)
        with torch.no_grad():
            for parameter in rounded.parameters():
                parameter.copy_(parameter.bfloat16())
        mdlm.write(tmp_path, time_conditioning)
        halves = {name: weight.bfloat16() for name, weight in mdlm.state_dict().items()}
        save_file(halves, tmp_path / "model.safetensors")
        model = load_dit(tmp_path)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        ids, t = torch.arange(LENGTH)[None], torch.tensor([0.5])
        want = rounded.logits(ids, t, time_conditioning)[..., :-1]
        assert (model(ids, t)[..., : VOCAB - 1] - want).norm() < 0.05 * want.norm()
        if time_conditioning:  # nothing is folded, so that in float32 it is exact
            assert_logits_of(load_dit(tmp_path, torch.float32), rounded, True)

    def test_there_and_into_our_layout(self, mdlm: MDLM, tmp_path: Path) -> None:
        load_dit(mdlm.write(tmp_path / "theirs", True)).save_pretrained(tmp_path / "ours")
        assert_logits_of(load_dit(tmp_path / "ours"), mdlm, True)

    def test_without_a_config(self, tmp_path: Path) -> None:
        """What the weights cannot tell is as MDLM publishes: heads of 64, no time conditioning, the mask id last."""
        model = MDLM(seed=2, blocks=1)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        config = load_dit(tmp_path / "model.safetensors").config
        assert (config.num_heads, config.time_conditioning, config.mask_id) == (1, False, VOCAB - 1)
        assert (config.max_length, config.num_blocks) == (1024, 1)

    def test_mask_and_end_of_text_ids_of_the_config(self, mdlm: MDLM, tmp_path: Path) -> None:
        """Checkpoints with BERT's tokenizer, as MDLM's for LM1B, have their mask id in the middle."""
        for name in ("mask_token_id", "mask_index"):
            model = load_dit(mdlm.write(tmp_path, eos_token_id=102, **{name: 103}))
            assert (model.config.mask_id, model.config.eos_id) == (103, 102)
            assert_logits_of(model, mdlm, False)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"n_blocks": 3}, r"missing \['blocks\.2\."),
            ({"n_blocks": 1}, r"not expected \['blocks\.1\."),
            ({"hidden_dim": 48}, "hidden_dim=48, the weights .* have 24"),
            ({"cond_dim": 128}, "cond_dim=128, the weights .* have 20"),
            ({"vocab_size": 518}, "vocab_size=518, the weights .* have 517"),
            ({"n_heads": 5}, "must split into 5 heads"),
        ],
    )
    def test_a_config_that_contradicts_the_weights_is_refused(
        self, mdlm: MDLM, tmp_path: Path, changes: dict[str, int], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            load_dit(mdlm.write(tmp_path, **changes))

    @pytest.mark.parametrize(
        "name",
        [
            "blocks.1.attn_qkv.weight",
            "blocks.0.mlp.0.weight",
            "blocks.0.adaLN_modulation.weight",
            "output_layer.adaLN_modulation.bias",
            "output_layer.linear.bias",
            "sigma_map.mlp.0.bias",
            "sigma_map.mlp.2.weight",
        ],
    )
    def test_missing_weights_are_refused(self, mdlm: MDLM, tmp_path: Path, name: str) -> None:
        mdlm.write(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights[f"backbone.{name}"]
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="missing"):
            load_dit(tmp_path)

    def test_weights_beyond_the_architecture_are_refused(self, mdlm: MDLM, tmp_path: Path) -> None:
        """A class-conditional variant has one more embedding: without it the logits would be wrong."""
        mdlm.write(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights["backbone.cls_map.embedding_table.weight"] = torch.ones(3, COND)
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"not expected \['cls_map"):
            load_dit(tmp_path)

    def test_other_checkpoints_are_refused(self, tmp_path: Path) -> None:
        save_file({"bert.embeddings.weight": torch.ones(3, 4)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"neither an mdkern checkpoint nor .*bert\.embeddings\.weight"):
            load_dit(tmp_path)
        torch.save([1, 2], tmp_path / "list.ckpt")
        with pytest.raises(ValueError, match="no mapping"):
            load_dit(tmp_path / "list.ckpt")
        (tmp_path / "text.ckpt").write_text("hello")
        with pytest.raises(ValueError, match=r"text\.ckpt is not a whole file of weights"):
            load_dit(tmp_path / "text.ckpt")


# Lightning's hyper-parameters hold OmegaConf's containers and a tokenizer. These classes have OmegaConf's names and the
# attributes that its pickles have, and are gone where the checkpoint is read.


class AnyNode:
    def __init__(self, value: Any) -> None:
        self._metadata, self._parent, self._val = {"flags": {}}, None, value


class DictConfig:
    def __init__(self, content: dict[str, Any]) -> None:
        self._metadata, self._parent = {"ref_type": dict}, None
        self._content = {
            name: DictConfig(value) if isinstance(value, dict) else AnyNode(value) for name, value in content.items()
        }


def run_of(name: str, **changes: Any) -> dict[str, Any]:
    """The configuration of a run as each repository has it, as far as it describes the model."""
    model = {"name": "small", "type": "ddit", "hidden_size": WIDTH, "cond_dim": COND, "length": LENGTH, "n_blocks": 2}
    model |= {"n_heads": HEADS, "scale_by_sigma": True, "dropout": 0.1, "tie_word_embeddings": False}
    noise, data = {"type": "loglinear", "sigma_min": 1e-4}, {"tokenizer_name_or_path": "gpt2"}
    common = {"model": model, "noise": noise, "data": data, "diffusion": "absorbing_state"}
    flat = {"backbone": "dit", "parameterization": "subs", "time_conditioning": False, "T": 0, "subs_masking": False}
    if name == "mdlm":
        return common | flat | changes
    algo = flat | {"name": name, "causal_attention": False}
    if name == "bd3lm":
        common |= {"block_size": 4}
        algo |= {"cross_attn": True, "sampler": "semi_ar"}
    if name in ("duo", "duo_base"):
        del common["diffusion"]
        algo |= {"parameterization": "mean", "time_conditioning": True}
    if name == "sedd":
        algo |= {"parameterization": "score", "time_conditioning": True}
    return common | {"algo": algo | changes}


@pytest.mark.parametrize("time_conditioning", [False, True])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_the_runs_own_settings_are_honoured(
    mdlm: MDLM, tmp_path: Path, time_conditioning: bool, reference: bool, prefix: str
) -> None:
    run = run_of("mdlm", time_conditioning=time_conditioning)
    if reference:
        run["size"], run["model"]["length"] = {"of": LENGTH}, "${size.of}"
    content = lightning(mdlm, None, hyper_parameters={"config": DictConfig(run), "tokenizer": object()})
    content["state_dict"] = {
        name.replace("backbone.", f"backbone.{prefix}"): tensor for name, tensor in content["state_dict"].items()
    }
    torch.save(content, tmp_path / "last.ckpt")
    model = load_dit(tmp_path / "last.ckpt")  # without any of it: 1 head, 1,024 positions, no time
    assert (model.config.num_heads, model.config.max_length, model.config.mask_id) == (HEADS, LENGTH, VOCAB - 1)
    assert_logits_of(model, mdlm, time_conditioning)


def test_the_newer_code_keeps_the_same_settings_elsewhere(mdlm: MDLM, tmp_path: Path) -> None:
    run = DictConfig(run_of("mdlm"))
    algorithm = DictConfig({"config": run_of("other") | {"algo": {"name": "mdlm", "time_conditioning": True}}})
    for config, time_conditioning in ((run, False), (algorithm._content["config"], True)):
        torch.save(lightning(mdlm, None, hyper_parameters={"config": config}), tmp_path / "last.ckpt")
        assert_logits_of(load_dit(tmp_path / "last.ckpt"), mdlm, time_conditioning)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_conditioning": True}, "time_conditioning=True, the run that wrote .* had False"),
        ({"n_heads": 4}, "n_heads=4, the run that wrote .* had 3"),
        ({"model_length": 99}, "model_length=99, the run that wrote .* had 12"),
        ({"mask_token_id": 5}, "mask_index=5, the run that wrote .* had 400"),
    ],
)
def test_settings_that_contradict_the_run_are_refused(
    mdlm: MDLM, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tokenizer = SlowTokenizer({"[MASK]": 400, "[SEP]": 401}, "[MASK]")
    parameters = {"config": DictConfig(run_of("mdlm")), "tokenizer": tokenizer}
    torch.save(lightning(mdlm, None, hyper_parameters=parameters), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=message):
        load_mdlm(tmp_path / "last.ckpt", changes)
    assert load_mdlm(tmp_path / "last.ckpt", {"mask_token_id": 400}).config.mask_id == 400


class SlowTokenizer:
    """As transformers' own pickle: tables of ids, and special tokens by their text."""

    def __init__(self, vocab: dict[str, int], mask_token: str | None) -> None:
        self.vocab, self._mask_token, self._eos_token = vocab, mask_token, "[SEP]"


@pytest.mark.parametrize("with_mask", [False, True])
def test_the_mask_is_that_of_the_runs_tokenizer(mdlm: MDLM, tmp_path: Path, with_mask: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    from mdkern.pretrained import FOLDER

    content = json.loads((FOLDER / "tokenizer" / "tokenizer.json").read_text())
    vocab = {token: number for token, number in content["model"]["vocab"].items() if number < VOCAB - 1}
    content["model"] |= {"vocab": vocab, "merges": []}
    content["added_tokens"] = content["added_tokens"][:1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    special = {"eos_token": "<|endoftext|>"} | ({"mask_token": "z"} if with_mask else {})
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **special)
    slow = SlowTokenizer({"[SEP]": 0, "[MASK]": 90}, "[MASK]" if with_mask else None)
    for tokenizer, mask_id in ((fast, vocab["z"]), (slow, 90)):
        parameters = {"config": DictConfig(run_of("mdlm")), "tokenizer": tokenizer}
        torch.save(lightning(mdlm, None, hyper_parameters=parameters), tmp_path / "last.ckpt")
        config = load_dit(tmp_path / "last.ckpt").config
        assert (config.mask_id, config.eos_id) == (mask_id if with_mask else VOCAB - 1, 0)


REASONS = {
    "bd3lm": "block by block",
    "duo": "uniformly random tokens",
    "duo_base": "uniformly random tokens",
    "sedd": "ratios of probabilities",
    "ar": "autoregressive",
    "d3pm": "gives the mask a probability",
}


@pytest.mark.parametrize("name", REASONS)
def test_relatives_are_recognised_and_refused(mdlm: MDLM, tmp_path: Path, name: str) -> None:
    """As a checkpoint of their training, and as a folder of transformers."""
    torch.save(lightning(mdlm, None, hyper_parameters={"config": DictConfig(run_of(name))}), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=REASONS[name]):
        load_dit(tmp_path / "last.ckpt")
    folder = mdlm.write(tmp_path / "folder", model_type=name.upper() if name == "duo" else name)
    with pytest.raises(ValueError, match=REASONS[name]):
        load_dit(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameterization": "d3pm"}, "parameterization 'd3pm' is not"),
        ({"parameterization": "sedd"}, "ratios of probabilities"),
        ({"backbone": "dimamba"}, "backbone is 'dimamba'"),
        ({"diffusion": "uniform"}, "noise is 'uniform'"),
        ({"time_conditioning": True, "noise": {"type": "cosine"}}, "times of noise 'cosine'"),
    ],
)
def test_runs_of_mdlms_code_with_another_model_are_refused(
    mdlm: MDLM, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = DictConfig(run_of("mdlm", **changes))
    torch.save(lightning(mdlm, None, hyper_parameters={"config": config}), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=message):
        load_dit(tmp_path / "last.ckpt")


def test_relatives_are_recognised_by_their_weights(mdlm: MDLM, tmp_path: Path) -> None:
    state = mdlm.state_dict()
    save_file(state | {"sampling_eps_min": torch.tensor(1e-3)}, tmp_path / "bd3lm.safetensors")
    plain = {name: tensor for name, tensor in state.items() if "adaLN" not in name and "sigma_map" not in name}
    save_file(plain, tmp_path / "no_adaln.safetensors")
    bare = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    torch.save({"model": bare, "ema": {"shadow_params": []}, "optimizer": {}, "step": 3}, tmp_path / "checkpoint.pth")
    for file, message in (
        ("bd3lm.safetensors", "block by block"),
        ("no_adaln.safetensors", "no adaLN modulations"),
        ("bare.safetensors", r"without 'backbone\.'.*ratios of probabilities"),
        ("checkpoint.pth", "training checkpoint of SEDD"),
    ):
        with pytest.raises(ValueError, match=message):
            load_dit(tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps({"graph": {"type": "absorb"}, "tokens": VOCAB - 1}))
    with pytest.raises(ValueError, match="ratios of probabilities"):
        load_dit(tmp_path / "bare.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(mdlm.config()))
    assert_logits_of(load_dit(tmp_path / "bare.safetensors"), mdlm, False)


class TestHostileFiles:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_blocks": 10**6}, r"missing \['blocks\.2\.\*'\] of 1000000 blocks"),
            ({"num_blocks": 10**18}, "blocks"),
            ({"max_length": 10**8}, "max_length must be at most 1048576"),
            ({"width": 10**12, "num_heads": 1}, r"the config wants \(11, 1000000000000\)"),
            ({"vocab_size": 10**12}, r"the config wants \(1000000000000, 16\)"),
            ({"cond_dim": 10**9}, "cond_dim must be at most"),
            ({"mlp_ratio": 10**6}, "the config wants"),
            ({"num_heads": 0}, "num_heads must be at least 1, not 0"),
            ({"width": "16"}, "width must be a whole number, not '16'"),
            ({"num_blocks": 2.0}, r"num_blocks must be a whole number, not 2\.0"),
            ({"tie_head": "no"}, "tie_head must be true or false"),
            ({"mask_id": None}, "mask_id must be a whole number"),
        ],
    )
    def test_sizes_are_compared_before_anything_is_built(
        self, make_dit: MakeDiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
    ) -> None:
        make_dit().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        built: list[DiTConfig] = []
        monkeypatch.setattr(checkpoint, "DiT", lambda config: built.append(config) or DiT(config))
        with pytest.raises(ValueError, match=message):
            load_dit(tmp_path)
        assert all((config.num_blocks, config.max_length) == (1, 1) for config in built)

    @pytest.mark.parametrize(
        "text", ["", "[1]", '"x"', "{", "\x00", "[" * 100_000, '{"model_type": "mdkern-dit"}', "1e5"]
    )
    def test_wrong_json_is_named(self, make_dit: MakeDiT, tmp_path: Path, text: str) -> None:
        make_dit().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            load_dit(tmp_path)

    @pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/../../b", "", "..\\b", 3, None])
    def test_an_index_reaches_no_other_folder(self, make_dit: MakeDiT, tmp_path: Path, shard: Any) -> None:
        folder = tmp_path / "model"
        make_dit().save_pretrained(folder)
        (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embedding": shard}}))
        with pytest.raises(ValueError, match=r"outside of its folder|no weight_map"):
            load_dit(folder)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
    @pytest.mark.parametrize("kind", ["pipe", "loop", "folder"])
    def test_what_is_no_plain_file_is_not_read(self, make_dit: MakeDiT, tmp_path: Path, name: str, kind: str) -> None:
        make_dit().save_pretrained(tmp_path)
        if name.endswith("index.json"):
            (tmp_path / "model.safetensors").unlink()
        (tmp_path / name).unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(tmp_path / name)
        elif kind == "loop":
            (tmp_path / name).symlink_to(tmp_path / name)
        else:
            (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=r"is no plain file|cannot be read"):
            load_dit(tmp_path)

    def test_devices_are_not_read(self) -> None:
        with pytest.raises(ValueError, match="/dev/zero is no plain file"):
            load_dit("/dev/zero")

    @pytest.mark.parametrize("width", [0, 3])
    def test_weights_of_no_width_or_no_floats(self, mdlm: MDLM, make_dit: MakeDiT, tmp_path: Path, width: int) -> None:
        mdlm.write(tmp_path / "theirs", hidden_dim=width)
        state = mdlm.state_dict() | {"backbone.vocab_embed.embedding": torch.ones(VOCAB, width)}
        save_file(state, tmp_path / "theirs" / "model.safetensors")
        with pytest.raises(ValueError, match=r"must be at least 1|do not describe|wants"):
            load_dit(tmp_path / "theirs")
        make_dit().save_pretrained(tmp_path / "ours")
        weights = {name: tensor.long() for name, tensor in make_dit().state_dict().items()}
        for name in ("embedding", "head_weight", "head_bias"):
            weights[name] = weights[name][:11].clone()
        save_file(weights, tmp_path / "ours" / "model.safetensors")
        with pytest.raises(ValueError, match=r"is of torch\.int64: a floating dtype is needed"):
            load_dit(tmp_path / "ours")

    def test_a_tensor_must_have_its_numbers(self, mdlm: MDLM, tmp_path: Path) -> None:
        state = mdlm.state_dict() | {"backbone.vocab_embed.embedding": torch.ones(1, 1).expand(10**9, WIDTH)}
        torch.save(state, tmp_path / "weights.ckpt")
        with pytest.raises(ValueError, match=r"embedding of .* has fewer bytes than its shape"):
            load_dit(tmp_path / "weights.ckpt")

    @pytest.mark.parametrize("name", ["{}/nowhere", "./nowhere", "a/b/c", "nowhere", "~/x", "runs/nowhere"])
    def test_a_mistyped_folder_is_no_request_to_the_hub(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*(nowhere|c|x)"):
            load_dit(name.format(tmp_path))

    def test_what_the_hub_does_not_have_may_be_a_folder_that_is_not_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(*_: Any, **__: Any) -> None:
            raise OSError("no route")

        monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
        with pytest.raises(FileNotFoundError, match=r"some/name: there is no such folder here, and .*no route"):
            load_dit("some/name")


def test_a_runs_folder_is_as_good_as_its_final_model(make_dit: MakeDiT, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match="has no final model yet"):
        load_dit(tmp_path)
    make_dit().save_pretrained(tmp_path / "final")
    assert_same(load_dit(tmp_path), make_dit())
