"""Check and time every candidate config of the Triton kernels on this GPU.

    python benchmarks/tune_triton.py [gemm] [conv]

Prints a table and writes tune_triton.json into the folder $OUT if that is set. Times are medians of CUDA graph replays of
CALLS calls, weights rotated through more memory than the L2 cache holds. Warp-specialized configs could hang: each is first
tried in a process of its own.
"""

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from sdtrt_backend.kernels.triton_conv import CONV_CONFIGS, ConvConfig, conv2d
from sdtrt_backend.kernels.triton_gemm import GEMM_CONFIGS, GemmConfig, gemm

CALLS, REPLAYS, THREADS, PATIENCE_S = 20, 7, 16, 120
COLD_BYTES = 120e6
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
ERROR_BOUND = {"int8": 5e-4, "fp8": 2e-3}  # relative, to float64; fp16 rounding is 2e-4

GEMM = (*GEMM_CONFIGS,
        GemmConfig(128, 256, 128, 4, 8, flatten=False),
        GemmConfig(256, 128, 128, 4, 8, flatten=False),
        GemmConfig(128, 128, 256, 3, 8),
        GemmConfig(128, 256, 256, 2, 8, flatten=False),
        GemmConfig(128, 64, 128, 4, 4, flatten=False, per_sm=2),
        GemmConfig(128, 256, 128, 3, 4, flatten=False, specialize=True),
        GemmConfig(256, 128, 128, 3, 4, flatten=False, specialize=True),
        GemmConfig(128, 128, 128, 4, 4, flatten=False, specialize=True))
CONV = (*CONV_CONFIGS,
        ConvConfig(256, 64, 64, 5, 8),
        ConvConfig(128, 64, 128, 4, 4, flatten=False, per_sm=2),
        ConvConfig(256, 128, 128, 4, 8, flatten=False),
        ConvConfig(128, 128, 256, 3, 8),
        ConvConfig(128, 256, 128, 3, 4, flatten=False, specialize=True),
        ConvConfig(256, 128, 128, 3, 4, flatten=False, specialize=True),
        ConvConfig(128, 128, 128, 4, 4, flatten=False, specialize=True))
CONFIGS = {"gemm": GEMM, "conv": CONV}
# gemm: rows, in, weight rows, act; conv: in, height = width, out, stride, at batch 2
SHAPES = {
    "gemm": ((2048, 1280, 1280, None), (2048, 1280, 3840, None), (2048, 1280, 10240, "geglu"), (2048, 5120, 1280, None),
             (8192, 640, 640, None), (8192, 640, 5120, "geglu"), (8192, 2560, 640, None), (154, 2048, 166400, None),
             (4608, 3072, 21504, None), (4608, 15360, 3072, None)),
    "conv": ((320, 128, 320, 1), (640, 128, 320, 1), (960, 128, 320, 1), (640, 64, 640, 1), (1280, 64, 640, 1),
             (1920, 64, 640, 1), (1280, 32, 1280, 1), (2560, 32, 1280, 1), (320, 128, 320, 2), (640, 64, 640, 2)),
}
CHECKS = {"gemm": ((1000, 1296, 1360, None), (1000, 1296, 1360, "geglu")), "conv": ((336, 32, 208, 1), (336, 64, 208, 2))}


class Problem:
    """Random operands of one shape."""

    def __init__(self, op, shape, dtype, copies=None):
        self.op, self.shape, self.dtype = op, shape, dtype
        if op == "gemm":
            m, k, n, self.act = shape
            x, weight, self.size = (m, k), (n, k), (m, n // 2 if self.act else n)
            self.flop = 2 * m * k * n
        else:
            c, hw, n, self.stride = shape
            x, weight, self.size = (2, c, hw, hw), (n, c, 3, 3), (2, n, hw // self.stride, hw // self.stride)
            self.flop = 2 * math.prod(self.size) * 9 * c
        copies = copies or max(1, min(8, math.ceil(COLD_BYTES / math.prod(weight))))
        self.x = self.codes(x)
        self.weights = [self.codes(weight) for _ in range(copies)]
        self.scale = (0.5 + torch.rand(n, device="cuda")) / math.prod(weight[1:]) ** 0.5 / (74.0**2 if dtype == "int8" else 1)
        self.bias = torch.randn(n, device="cuda")

    def codes(self, shape):
        dtype = DTYPES[self.dtype]
        x = torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda") if self.dtype == "int8" else (
            torch.randn(shape, dtype=torch.float16, device="cuda").to(dtype))
        return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x

    def run(self, config, weight=0, out=None):
        weight = self.weights[weight % len(self.weights)]
        if self.op == "gemm":
            return gemm(self.x, weight, self.scale, self.bias, act=self.act, config=config, out=out)
        return conv2d(self.x, weight, self.scale, self.bias, stride=(self.stride,) * 2, padding=(1, 1), config=config, out=out)

    def error(self, config):
        """Relative, to float64."""
        x, weight, scale, bias = self.x.double(), self.weights[0].double(), self.scale.double(), self.bias.double()
        if self.op == "gemm":
            exact = x @ weight.T * scale + bias
            if self.act:
                hidden, gate = exact.chunk(2, 1)
                exact = hidden * torch.nn.functional.gelu(gate)
        else:
            exact = torch.nn.functional.conv2d(x, weight, None, self.stride, 1)
            exact = exact * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
        out = torch.full_like(exact, float("nan"), dtype=torch.float16)
        y = self.run(config, out=out).double()
        return float((y - exact).norm() / exact.norm())

    def ms(self, config):
        """Of one call: the median of REPLAYS replays of a graph of CALLS calls."""
        out = self.run(config)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self.run(config, out=out)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(CALLS):
                self.run(config, i, out)
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / CALLS)
        return statistics.median(times)


def name(config):
    flags = "".join(f" {flag}" for flag, on in (("flat", config.flatten), ("specialized", config.specialize),
                                                ("x2", config.per_sm > 1), ("pointers", not getattr(config, "tma", True))) if on)
    return f"{config.block_m}x{config.block_n}x{config.block_k} s{config.stages} w{config.warps}{flags}"


def first_line(error):
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def trial(op, index):
    """In a process of its own: the checks of one config, in both precisions. Returns what failed."""
    command = [sys.executable, __file__, "trial", op, str(index)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return f"no answer in {PATIENCE_S} s"
    return "" if run.returncode == 0 else (run.stdout + run.stderr).strip().splitlines()[-1][:200]


def try_one(op, index):
    for dtype in DTYPES:
        # shapes of the table as well: a tile loop that runs often hangs more often
        for shape in (*CHECKS[op], *SHAPES[op][:2]):
            error = Problem(op, shape, dtype, 1).error(CONFIGS[op][index])
            if not error < ERROR_BOUND[dtype]:
                sys.exit(f"wrong: {dtype} {shape} relative error {error:.2g}")


def compile_all(problems, configs):
    """One launch per kernel that the problems need, in threads; returns {(config, problem's kernel): error line}."""
    failed = {}

    def launch(problem, config):
        try:
            problem.run(config)
        except Exception as error:
            failed[config, problem.op, problem.dtype, kernel(problem)] = first_line(error)

    needed = {(config, p.op, p.dtype, kernel(p)): (p, config) for p in problems for config in configs[p.op]}
    work = list(needed.values())
    for args in work[:1]:
        launch(*args)  # builds the launcher, which is no work for several threads
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda args: launch(*args), work[1:]))
    return failed


def kernel(problem):
    """What of a problem makes Triton compile again."""
    if problem.op == "gemm":
        return problem.act, tuple(size % 16 == 0 for size in problem.shape[:3])
    return problem.size[2:], problem.stride


def main():
    begun = time.monotonic()
    ops = [op for op in SHAPES if op in sys.argv[1:]] or list(SHAPES)
    failed = {}
    specialized = [(op, i) for op in ops for i, config in enumerate(CONFIGS[op]) if config.specialize]
    with ThreadPoolExecutor(len(specialized)) as pool:
        trials = {at: pool.submit(trial, *at) for at in specialized}
        checks = [Problem(op, shape, dtype, 1) for op in ops for shape in CHECKS[op] for dtype in DTYPES]
        problems = [Problem(op, shape, dtype) for op in ops for shape in SHAPES[op] for dtype in DTYPES]
        compiled = compile_all([*checks, *problems], {op: [c for c in CONFIGS[op] if not c.specialize] for op in ops})
        for (op, i), outcome in trials.items():
            if outcome.result():
                print(f"{op} {name(CONFIGS[op][i])}: dropped, {outcome.result()}", flush=True)
                failed[CONFIGS[op][i]] = outcome.result()
    good = {op: [c for c in CONFIGS[op] if c not in failed] for op in ops}
    compiled |= compile_all([*checks, *problems], {op: [c for c in good[op] if c.specialize] for op in ops})
    print(f"compiled in {time.monotonic() - begun:.0f} s; {len(compiled)} kernels failed", flush=True)
    for (config, op, dtype, what), line in compiled.items():
        print(f"{op} {name(config)} {dtype} {what}: {line}", flush=True)
    wrong = set()
    for problem in checks:
        for config in good[problem.op]:
            if (config, problem.op, problem.dtype, kernel(problem)) in compiled:
                continue
            try:
                error = problem.error(config)
            except Exception as failure:
                error, line = math.nan, first_line(failure)
            else:
                line = f"relative error {error:.2g}"
            if not error < ERROR_BOUND[problem.dtype]:
                wrong.add((config, problem.dtype))
                print(f"WRONG {problem.op} {problem.shape} {problem.dtype} {name(config)}: {line}", flush=True)
    for op in ops:
        print("\n".join(f"{op} {i}: {name(config)}" for i, config in enumerate(CONFIGS[op])))
    rows = []
    for problem in problems:
        ms = {}
        for config in good[problem.op]:
            if (config, problem.dtype) in wrong or (config, problem.op, problem.dtype, kernel(problem)) in compiled:
                continue
            try:
                ms[config] = problem.ms(config)
            except Exception as failure:
                print(f"{problem.op} {problem.shape} {problem.dtype} {name(config)}: {first_line(failure)}", flush=True)
        if not ms:
            continue
        best = min(ms, key=ms.__getitem__)
        tflops = problem.flop / ms[best] / 1e9
        each = " ".join(f"{ms[c]:.4f}" if c in ms else "-" for c in CONFIGS[problem.op])
        print(f"{problem.op} {problem.shape!s:28} {problem.dtype:5} {name(best):32} {ms[best]:.4f} ms {tflops:5.0f} T/s | {each}",
              flush=True)
        rows.append({"op": problem.op, "shape": problem.shape, "dtype": problem.dtype, "config": dataclasses.asdict(best),
                     "ms": ms[best], "tflops": tflops, "all_ms": {name(c): value for c, value in ms.items()}})
    print(f"{time.monotonic() - begun:.0f} s")
    if "OUT" in os.environ:
        found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        (Path(os.environ["OUT"]) / "tune_triton.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["trial"]:
        try_one(sys.argv[2], int(sys.argv[3]))
    else:
        main()
