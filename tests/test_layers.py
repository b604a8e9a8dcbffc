"""The architecture: no import runs upward, and importing the package stays light."""

import ast
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import sdtrt_backend

ROOT = Path(sdtrt_backend.__file__).parent
LAYERS = (
    {"errors", "values", "weights"},
    {"rules", "options", "recipe", "modelopt", "timesteps", "stats", "metrics", "ops", "report", "store", "graphs"},
    {"fx", "measure", "emulate", "enginecache", "kernels.problem", "kernels.cudnn", "kernels.cublaslt", "kernels.triton_gemm",
     "kernels.triton_conv", "kernels.triton_norm", "kernels.triton_attention", "kernels.triton_rope",
     "kernels.triton_candidates"},
    {"kernels.timing", "kernels.providers"},
    {"kernels.measurements"},
    {"kernels.gpu", "kernels.onednn"},
    {"kernels.choose"},
    {"kernels"},
    {"latency", "capture", "calibrate", "resume", "budget", "smooth", "quantize", "assign", "partition", "engine"},
    {"lower", "lower.inductor_cpu", "lower.inductor_cuda", "lower.producers",
     "lower.attention", "lower.onnx", "lower.tensorrt", "lower.reference", "lower.torchao"},
    {"drift"},
    {"run"},
    {"backend"},
    {"heatmaps", "pipeline", "torchao_config", "autoquant", "export"},
    {"demo"},
    {"cli", "__init__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# neighbours of one level that may be imported: (importer, imported): reason
SIDEWAYS = {
    ("options", "rules"): "options are checked against the tables",
    ("recipe", "modelopt"): "Recipe.from_modelopt and to_modelopt, when they are called",
    ("modelopt", "recipe"): "it reads and writes recipes",
    ("modelopt", "rules"): "the kinds of layers",
    ("modelopt", "stats"): "how far two weights are apart",
    ("rules", "stats"): "clips of the range rules",
    ("options", "metrics"): "the largest PSNR there is",
    ("report", "recipe"): "what min_psnr found is told from a recipe",
    ("calibrate", "resume"): "what a folder keeps, when one is named",
    ("resume", "calibrate"): "the statistics that it keeps",
    ("calibrate", "budget"): "min_psnr is solved with the calibration's pipeline",
    ("budget", "capture"): "the graph whose parts are tried",
    ("budget", "quantize"): "the plan, and the Q/DQ of a part",
    ("quantize", "smooth"): "smoothing is part of inserting Q/DQ",
    ("lower", "lower.inductor_cpu"): "the table of lowerings",
    ("lower", "lower.inductor_cuda"): "the table of lowerings",
    ("lower", "lower.reference"): "the table of lowerings",
    ("lower.inductor_cuda", "lower.producers"): "its rewrites of norms, GEGLU and attention",
    ("lower", "lower.tensorrt"): "the table of lowerings",
    ("lower", "lower.torchao"): "the table of lowerings",
    ("lower.torchao", "lower.inductor_cuda"): "its rewrite of linears",
    ("lower.torchao", "lower.producers"): "its simplifications",
    ("lower.tensorrt", "lower.onnx"): "what an engine is built from",
    ("lower.tensorrt", "lower.inductor_cuda"): "the parts that TensorRT does not take",
    ("lower.inductor_cuda", "lower.attention"): "its rewrites of what attention reads",
    ("lower.attention", "lower.producers"): "the names of additions, products and transpositions",
    ("kernels.triton_rope", "kernels.triton_gemm"): "its checks of arguments",
    ("kernels.triton_rope", "kernels.triton_norm"): "the encoding of 8-bit results",
    ("kernels.triton_conv", "kernels.triton_gemm"): "the epilogue that both kernels have",
    ("kernels.triton_norm", "kernels.triton_gemm"): "its checks of arguments",
    ("kernels.triton_attention", "kernels.triton_gemm"): "its checks of arguments",
    ("kernels.triton_attention", "kernels.triton_norm"): "the encoding of 8-bit results",
    ("kernels.triton_candidates", "kernels.triton_attention"): "the kernels it adapts",
    ("kernels.triton_candidates", "kernels.triton_norm"): "the kernels it adapts",
    ("kernels.triton_candidates", "kernels.triton_gemm"): "the kernels it adapts",
    ("kernels.triton_candidates", "kernels.triton_conv"): "the kernels it adapts",
    ("report", "metrics"): "the type of pictures",
}
HEAVY = ("diffusers", "transformers", "tensorrt", "torch_tensorrt", "modelopt", "torchao", "onnx",
         "onnxscript", "onnxruntime", "tensorrt_rtx")


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Our modules that a file imports at module level or inside functions."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            for alias in node.names:
                dotted = ".".join((*base, *(node.module or alias.name).split(".")))
                yield dotted


def test_every_file_has_a_layer_and_imports_only_from_below():
    wrong = []
    for path in ROOT.rglob("*.py"):
        name = module_name(path)
        assert name in LEVEL, f"{name} has no layer"
        for other in imports(path):
            if LEVEL[other] >= LEVEL[name] and (name, other) not in SIDEWAYS:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_importing_the_package_loads_no_heavy_library():
    code = f"import sys, sdtrt_backend; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_backend_is_registered_without_importing_us():
    (entry,) = entry_points(group="torch_dynamo_backends", name="sd_int8")
    assert entry.load() is sdtrt_backend.sd_int8
