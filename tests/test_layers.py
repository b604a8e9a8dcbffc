"""The architecture: one order of all modules, in which every import goes back; and importing the package stays light."""

import ast
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import sdtrt_backend

ROOT = Path(sdtrt_backend.__file__).parent
# A module imports from the layers above its own in this table, and in its own from the modules before it. "__init__" is the
# package: what a user imports.
LAYERS = {
    "words": ["errors", "text", "values", "provenance", "metrics", "stats", "timesteps"],
    "files": ["files", "store", "enginecache"],
    "tables": ["roles", "rules", "options", "modelopt", "recipe", "page", "report"],
    "memory": ["weights", "buffers", "constants", "graphs"],
    "arithmetic": ["ops", "emulate", "measure", "latency"],
    "program": ["names", "identity", "calls", "fx", "scalars", "work", "capture", "programs", "recurring",
                "regions"],
    "kernels": ["kernels.problem", "kernels.timing", "kernels.measurements", "kernels.cudnn", "kernels.cublaslt", "kernels.fa3",
                "kernels.triton_gemm", "kernels.triton_conv", "kernels.triton_norm", "kernels.triton_attention",
                "kernels.triton_rope", "kernels.triton_candidates", "kernels.triton_weights", "kernels.providers", "kernels.gpu",
                "kernels.onednn", "kernels.choose", "kernels"],
    "plan": ["smooth", "quantize", "rotate", "assign", "partition"],
    "calibration": ["parts", "observe", "resume", "budget", "pictures", "calibrate"],
    "lowerings": ["engine", "lower.lowered", "lower.reference", "lower.producers", "lower.attention", "lower.inductor_cpu",
                  "lower.inductor_cuda", "lower.torchao", "lower.onnx", "lower.tensorrt", "lower"],
    "build": ["drift", "build"],
    "state of a compiled module": ["clock", "merge", "adapters", "state", "unit", "step"],
    "backend": ["backend"],
    "user's functions": ["bundle", "pipeline", "lora", "export", "heatmaps", "torchao_config", "autoquant", "__init__"],
    "demo": ["demo"],
    "servers": ["serving.ask", "serving.painter", "serving.triton_model", "serving.triton", "serving.jobs", "serving.answers",
                "serving.batcher", "serving.load", "serving.http", "serving"],
    "command line": ["arguments", "serving.commands", "cli", "command"],
}
ORDER = [module for modules in LAYERS.values() for module in modules]
HEAVY = ("PIL", "rich", "typer", "diffusers", "transformers", "tensorrt", "torch_tensorrt", "tensorrt_rtx", "modelopt", "torchao",
         "onnx", "onnxscript", "onnxruntime")


def module_name(path, root):
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def only_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING"


def executed(node):
    """Every node under this one, also inside functions, without what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if only_for_types(child):
            for other in child.orelse:
                yield from (other, *executed(other))
        else:
            yield from (child, *executed(child))


def imports(path, root):
    """Modules of the package that a file imports, by their names in LAYERS."""
    known = {module_name(found, root) for found in root.rglob("*.py")}
    package = path.relative_to(root).parts[:-1]

    def named(base, names):
        """``from base import names``: each name is a module of that package, or base itself defines it."""
        for name in names:
            dotted = ".".join((*base, name))
            yield dotted if dotted in known else ".".join(base) or "__init__"

    for node in executed(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple((node.module or "").split(".") if node.module else ())
            yield from named(base, [alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == root.name:
            yield from named(tuple(node.module.split(".")[1:]), [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            ours = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == root.name]
            yield from (".".join(parts) or "__init__" for parts in ours)


def wrong_imports(root, order):
    """"a imports b" for each import that does not go to a module before it in ``order``."""
    place = {module: position for position, module in enumerate(order)}
    return [f"{name} imports {other}" for path in sorted(root.rglob("*.py")) for name in [module_name(path, root)]
            for other in dict.fromkeys(imports(path, root)) if place[other] >= place[name]]


def test_the_table_names_every_module_once():
    assert sorted(ORDER) == sorted(module_name(path, ROOT) for path in ROOT.rglob("*.py"))


def test_every_import_goes_to_a_module_before_it_so_there_is_no_circle():
    assert wrong_imports(ROOT, ORDER) == []


def test_contributing_md_has_the_same_table():
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text.partition("## Layout")[2], re.MULTILINE)[2:]
    told = {layer: re.findall(r"`([^`]+)`", files) for layer, files in reversed(rows)}
    assert list(told) == list(LAYERS)
    for layer, modules in LAYERS.items():
        folders = [f"{m.split('.')[0]}/" if (ROOT / m.split(".")[0]).is_dir() else m for m in modules]
        assert told[layer] == list(dict.fromkeys(folders))


@pytest.mark.parametrize("line", [
    "from . import upper", "from .upper import X", "import package.upper", "from package import upper",
    "from package.upper import X", "def f():\n    from .upper import X",
    "if TYPE_CHECKING:\n    pass\nelse:\n    from .upper import X", "from . import X"])
def test_an_import_that_goes_forward_is_found_in_every_form(tmp_path, line):
    root = tmp_path / "package"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "lower.py").write_text(line)
    (root / "upper.py").write_text("from .lower import Y\nif TYPE_CHECKING:\n    from . import __init__\n")
    last = "__init__" if line.endswith("import X") and "upper" not in line else "upper"
    assert wrong_imports(root, ["lower", "upper", "__init__"]) == [f"lower imports {last}"]


def test_importing_the_backend_loads_no_heavy_library():
    """It is what torch.compile's entry point loads, and it loads the package."""
    code = f"import sys, sdtrt_backend.backend; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_backend_is_registered_without_importing_us():
    (entry,) = entry_points(group="torch_dynamo_backends", name="sd_int8")
    assert entry.module == "sdtrt_backend.backend"
    assert entry.load() is sdtrt_backend.sd_int8
