"""Check and time every config of the Triton norms, GEGLU and attention on this GPU, beside torch.

    python benchmarks/tune_norm.py [cross] [flash] [group] [layer] [geglu] [group16]

Prints a table and writes tune_norm.json into the folder $OUT if that is set; ends within PATIENCE_S. Times are medians of
CUDA graph replays of CALLS calls on the same tensors, which stay in the L2 cache where they fit, as a tensor does that the
layer before has just written. GB/s counts every input and result once. Beside the kernels: the same written in torch, by
torch.compile, attention by cuDNN with a compiled quantisation after it.
"""

import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdtrt_backend.kernels.triton_attention import FLASH_CONFIGS, SHORT_CONFIGS, attention
from sdtrt_backend.kernels.triton_norm import NORM_CONFIGS, RowConfig, geglu, group_norm, layer_norm

CALLS, REPLAYS, THREADS, PATIENCE_S = 20, 5, 16, 170
COMPILE_UNTIL_S = 130  # torch.compile takes seconds a shape: it gives way to the kernels
ERROR_BOUND = 0.65  # of an int8 step, to float64: rounding is 0.5, tanh.approx and fp16 probabilities are the rest
GROUP = ((320, 0, 128), (640, 0, 128), (640, 320, 128), (640, 0, 64), (1280, 0, 64), (1280, 640, 64), (960, 0, 64), (1280, 0, 32),
         (1280, 1280, 32), (1920, 0, 32), (128, 0, 32))  # c, c2, height = width; 32 groups
CROSS = ((2, 20, 1024, 77, 64), (2, 10, 4096, 77, 64), (2, 8, 4096, 77, 40))  # batch, heads, queries, keys, width
FLASH = ((2, 20, 1024, 1024, 64), (2, 10, 4096, 4096, 64))
ROWS = ((8192, 640), (2048, 1280), (65536, 640))
BEGUN = time.monotonic()
HALF, INT8, LAST = torch.float16, torch.int8, torch.channels_last


@dataclass
class Case:
    """Ways to the same int8 tensor: ``ours`` by config; ``torch_ways`` by name, the first is compared with."""

    op: str
    shape: tuple
    traffic: float
    flop: float
    ours: dict
    torch_ways: dict
    exact: object  # () -> float64, before rounding; None: not checked


def randn(*shape):
    return torch.randn(shape, dtype=HALF, device="cuda")


def code(y, scale):
    return (y * scale).round().clamp(-128, 127).to(INT8)


def attention_case(op, shape, configs):
    n, heads, queries, tokens, width = shape
    q, k, v = (randn(n, t, heads, width).transpose(1, 2) for t in (queries, tokens, tokens))
    scale, out_scale = width**-0.5, torch.full((1,), 200.0, device="cuda")
    quantize = torch.compile(lambda y, s: code(y.float(), s), dynamic=False)

    def library():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)

    def exact():
        heads_of = zip(*(t.flatten(0, 1).unbind() for t in (q, k, v)), strict=True)  # one at a time: scores take 8 bytes each
        y = [torch.softmax(a.double() @ b.double().mT * scale, -1) @ c.double() for a, b, c in heads_of]
        return torch.stack(y).view(q.shape) * 200.0

    ours = {name(c): partial(attention, q, k, v, scale, out_scale, INT8, c) for c in configs}
    ours["to fp16"] = partial(attention, q, k, v, scale, None, HALF, configs[0])
    ways = {"cudnn + quantise": lambda: quantize(library(), out_scale), "cudnn": library,
            "any + quantise": lambda: quantize(F.scaled_dot_product_attention(q, k, v, scale=scale), out_scale)}
    return Case(op, shape, 3 * q.numel() + 4 * k.numel(), 4 * q.numel() * tokens, ours, ways, exact)


def group_case(n, c, c2, size):
    x = randn(n, c, size, size).contiguous(memory_format=LAST)
    x2 = randn(n, c2, size, size).contiguous(memory_format=LAST) if c2 else None
    weight, bias, out_scale = randn(c + c2), randn(c + c2), torch.full((1,), 25.0, device="cuda")

    def plain(x, x2, s):
        y = F.group_norm(x if x2 is None else torch.cat([x, x2], 1), 32, weight, bias, 1e-5)
        return code(F.silu(y.float()), s)

    def exact():
        wide = x if x2 is None else torch.cat([x, x2], 1)
        return F.silu(F.group_norm(wide.double(), 32, weight.double(), bias.double(), 1e-5)) * 25.0

    ours = {name(config): partial(group_norm, x, x2, 32, weight, bias, 1e-5, True, out_scale, INT8, config=config)
            for config in NORM_CONFIGS}
    compiled = torch.compile(plain, dynamic=False)
    values = n * (c + c2) * size**2
    small = n == 2  # at batch 16 the kernels are the same, and checking takes long
    return Case("group", (n, c, c2, size), 3 * values, 0, ours, {"compile": lambda: compiled(x, x2, out_scale)} if small else {},
                exact if small else None)


def layer_case(height, width):
    x, residual, weight, bias = randn(height, width), randn(height, width), randn(width), randn(width)
    out_scale = torch.full((1,), 25.0, device="cuda")

    def plain(x, residual, s):
        total = x + residual
        return total, code(F.layer_norm(total.float(), (width,), weight.float(), bias.float()), s)

    ours = {"default": lambda: layer_norm(x, residual, weight, bias, 1e-5, out_scale, INT8)[1]}
    for config in ((1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (4, 4), (4, 8)):
        ours[f"{config[0]} rows w{config[1]}"] = partial(
            lambda config: layer_norm(x, residual, weight, bias, 1e-5, out_scale, INT8, config)[1], RowConfig(*config))
    compiled = torch.compile(plain, dynamic=False)
    return Case("layer", (height, width), 7 * x.numel(), 0, ours, {"compile": lambda: compiled(x, residual, out_scale)[1]},
                lambda: F.layer_norm((x + residual).double(), (width,), weight.double(), bias.double()) * 25.0)


def geglu_case(height, width):
    x, out_scale = randn(height, 2 * width), torch.full((1,), 25.0, device="cuda")

    def plain(x, s):
        hidden, gate = x.float().chunk(2, -1)
        return code(hidden * F.gelu(gate), s)

    ours = {f"{tile} w{warps}": partial(geglu, x, out_scale, INT8, tile, warps)
            for tile, warps in ((4096, 8), (2048, 8), (2048, 4), (1024, 4), (4096, 4), (8192, 8))}
    compiled = torch.compile(plain, dynamic=False)
    return Case("geglu", (height, width), 2.5 * x.numel(), 0, ours, {"compile": lambda: compiled(x, out_scale)},
                lambda: x[:, :width].double() * F.gelu(x[:, width:].double()) * 25.0)


CASES = {
    "cross": [partial(attention_case, "cross", shape, SHORT_CONFIGS) for shape in CROSS],
    "flash": [partial(attention_case, "flash", shape, FLASH_CONFIGS) for shape in FLASH],
    "group": [partial(group_case, 2, *shape) for shape in GROUP],
    "layer": [partial(layer_case, *shape) for shape in ROWS],
    "geglu": [partial(geglu_case, height, 4 * width) for height, width in ROWS],
    "group16": [partial(group_case, 16, *shape) for shape in GROUP],
}


def name(config):
    numbers = astuple(config)
    flags = [flag for flag in ("overlap", "fast_silu") if getattr(config, flag, False)]
    return " ".join(["x".join(str(n) for n in numbers if not isinstance(n, bool)), *flags])


def first_line(error):
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def elapsed():
    return time.monotonic() - BEGUN


def microseconds(call):
    """Of one call: the median of REPLAYS replays of a graph of CALLS calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def attempt(case, way, run, *args):
    """run(*args), or None after printing why not."""
    try:
        return run(*args)
    except Exception as error:
        print(f"{case.op} {case.shape} {way}: {first_line(error)}", flush=True)
        return None


def compiled(case):
    """The ways whose kernels compile, compiled: in threads, after one that builds what they share."""
    ways = list(case.ours.items())
    done = [attempt(case, *ways[0])]
    with ThreadPoolExecutor(THREADS) as pool:
        done += pool.map(lambda way: attempt(case, *way), ways[1:])
    return {way: call for (way, call), y in zip(ways, done, strict=True) if y is not None}


def wrong(case, ways):
    """The ways whose result is further than ERROR_BOUND from the exact one."""
    exact = case.exact().clamp(-128, 127)
    found = set()
    for way, call in ways.items():
        y = attempt(case, way, call)
        if y is None or y.dtype is not INT8:
            continue
        away = float((y.double() - exact).abs().max())
        if not away <= ERROR_BOUND:
            print(f"WRONG {case.op} {case.shape} {way}: {away:.3g} steps from the exact result", flush=True)
            found.add(way)
    return found


def measure(case):
    ways = compiled(case)
    bad = wrong(case, ways) if case.exact else set()
    ours = {way: attempt(case, way, microseconds, call) for way, call in ways.items() if way not in bad}
    ours = {way: us for way, us in ours.items() if us is not None}
    theirs = {}
    if elapsed() < COMPILE_UNTIL_S:
        theirs = {way: attempt(case, way, microseconds, call) for way, call in case.torch_ways.items()}
    best = min((way for way in ours if way != "to fp16"), key=ours.__getitem__, default=None)
    if best is None:
        return None
    us = ours[best]
    rate = f"{case.flop / us / 1e6:5.0f} TFLOP/s" if case.flop else " " * 13
    baseline = next(iter(theirs.values()), None)
    ratio = f"{baseline / us:5.2f}x" if baseline else "     -"
    print(f"{case.op:5} {case.shape!s:24} {best:28} {us:8.2f} us {case.traffic / us / 1e3:6.0f} GB/s {rate} {ratio} of torch | "
          + ", ".join(f"{way} {'-' if t is None else f'{t:.2f}'}" for way, t in (ours | theirs).items()), flush=True)
    return {"op": case.op, "shape": case.shape, "best": best, "us": us, "gb_per_s": case.traffic / us / 1e3,
            "tflop_per_s": case.flop / us / 1e6, "ours_us": ours, "torch_us": theirs}


def main():
    rows = []
    for op in [op for op in CASES if op in sys.argv[1:]] or list(CASES):
        for make in CASES[op]:
            if elapsed() > PATIENCE_S - 10:
                print(f"{op}: out of time")
                break
            try:
                row = measure(make())
            except Exception as error:
                print(f"{op} {make.args}: {first_line(error)}", flush=True)
                continue
            rows += [row] if row else []
    print(f"{elapsed():.0f} s")
    us = [row["us"] for row in rows if row["op"] == "group" and row["shape"][0] == 2]
    if us:
        print(f"group norms at batch 2: geometric mean {math.exp(sum(map(math.log, us)) / len(us)):.2f} us")
    if "OUT" in os.environ:
        found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        (Path(os.environ["OUT"]) / "tune_norm.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
