"""Does the Gluon kernel run now? Checks and times it: python -m benchmarks.hopper_probe"""
import sys, time
import torch, triton
import torch.nn.functional as F
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
import hopper_projection as hp
from mdkern.kernels import reference, vocab_projection
from mdkern.kernels.triton_finish import _finish
from benchmarks.harness import GpuTimer

D, V = 768, 50258
P = torch.cuda.get_device_properties(0).multi_processor_count
began = time.time()

def desc(x, block):
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))

class Problem:
    def __init__(self, M):
        g = torch.Generator("cuda").manual_seed(M)
        self.M = M
        self.source = torch.randn(max(64, 2 * M), D, device="cuda", generator=g).bfloat16()
        self.weight = (torch.randn(V, D, device="cuda", generator=g) * 0.1).bfloat16()
        self.padded = F.pad(self.weight, (0, 0, 0, -V % 64))
        self.index = torch.randperm(len(self.source), device="cuda", generator=g)[:M].sort().values
        self.hidden = self.source[self.index]
        n = torch.arange(M, device="cuda")
        self.keys = torch.stack((n // 1024, n % 1024, n * 0), 1).contiguous()
        self.seed = torch.tensor(7, device="cuda")
        self.bias = torch.zeros(V, device="cuda"); self.bias[-1] = -torch.inf
        self.ones = torch.ones(M, device="cuda")

    def run(self, mode, wg, bn, stages, stationary, pdl=True):
        M, BM = self.M, 64 * wg
        tiles = triton.cdiv(M, BM)
        st = torch.empty(tiles + P, 6, BM, device="cuda"); le = torch.empty(tiles + P, BM, 64, device="cuda")
        src = self.source if stationary else desc(self.source.index_select(0, self.index), [BM, 64])
        bias, temp = (None, None) if mode == 0 else (self.bias, self.ones)
        hp._project[(P,)](src, desc(self.weight, [bn, 64]), bias, self.index, None, temp, self.seed, self.keys, st, le, M, V, D,
            self.source.stride(0), 1.0, 0.0, DEPTH_TILES=D // 64, CONSUMERS=wg, BN=bn, BK=64, STAGES=stages, STATIONARY=stationary,
            PROGRAMS=P, MODE=mode, WANT_TOP=True, WANT_ENTROPY=True, HAS_SCALE=False, HAS_CAP=False, REGISTERS=240, num_warps=4)
        tok = torch.empty(M, dtype=torch.int64, device="cuda"); o = [torch.empty(M, device="cuda") for _ in range(5)]
        rest = tiles % P
        sb, ra = (512, 1) if (P // rest if rest else 1) > 32 else (32, 8)
        _finish[(triton.cdiv(M, ra),)](st, le, None, temp, 0.0 if mode == 0 else 1.0, self.seed, self.keys, tok, o[0], o[4], o[1], o[2], o[3], M, V,
            BM=BM, BN=bn, PROGRAMS=P, ROWS=ra, SPLITS=sb, MODE=mode, WANT_TOP=True, WANT_ENTROPY=True, PDL=pdl,
            num_warps=1 if ra == 1 else 4, launch_pdl=pdl)
        return tok, *o

timer = GpuTimer()
few, many, mid = (1, 128, 7, True), (2, 256, 4, False), (2, 128, 6, False)
for M, tilings in ((16, [few]), (16384, [many]), (64, [few]), (128, [few, mid, many]), (1024, [many, mid]), (4096, [many]), (256, [many, mid]), (512, [many])):
    p = Problem(M)
    runs = {"gemm": lambda: F.linear(p.hidden, p.padded),
            "triton": lambda: vocab_projection(p.source, p.weight, p.bias, p.index, p.ones, p.seed, p.keys, want_top=True, want_entropy=True)}
    some = torch.arange(0, M, max(1, M // 256), device="cuda")
    for t in tilings:
        for mode in (1, 0):
            got = p.run(mode, *t); torch.cuda.synchronize()
            want = reference.vocab_projection(p.source, p.weight, p.bias if mode else None, p.index[some], None, None, float(mode), p.seed, p.keys[some], 1.0, 0.0, True, True)
            same = got[0][some] == want[0]
            worst = max((a[some] - b)[same].abs().max().item() for a, b in zip(got[1:], want[1:]))
            print(f"M {M} {t} mode {mode}: {int((~same).sum())}/{len(some)} differ, {worst:.1e}", flush=True)
            runs[f"{t} {'mixed+b' if mode else 'greedy'}"] = lambda mode=mode, t=t: p.run(mode, *t)
    times = timer.compare(runs, turns=2 if M > 2000 else 8, rounds=9)
    base = times["gemm"].median
    print(f"M {M}: " + "  ".join(f"{n} {t.median * 1e3:.1f} ({t.median / base:.2f})" for n, t in times.items()), f"[{time.time() - began:.0f} s]", flush=True)
