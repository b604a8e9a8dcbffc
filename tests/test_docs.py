"""README and docs: their links lead somewhere, their options are those that there are, their Python is Python."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_small_pipelines import sdxl

import sdtrt_backend
from sdtrt_backend.options import Options

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# blocks that begin so are no Python
COMMANDS = ("curl ", "make ", "pip ", "sdtrt ", "python ", "out/", "tensorrt_rtx ", "tritonserver ", "  ")


BLOCKS = re.compile(r"^\n(?P<indented>(?:    .*\n|\n(?=    ))+)|^```\w+\n(?P<fenced>(?:(?!```).*\n)+)", re.MULTILINE)


def blocks(text):
    """Indented and fenced ones, in their order, without their indentation."""
    return [re.sub("^    ", "", m["indented"] or m["fenced"], flags=re.MULTILINE).strip("\n") for m in BLOCKS.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert not [link for link in links if not link.startswith("https://") and not (page.parent / link).exists()]


def test_every_page_can_be_reached_from_the_readme():
    linked = set(re.findall(r"\]\(docs/([^)#\s]+)", (ROOT / "README.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= linked


def test_the_reference_has_everything_that_users_import():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", pages, re.MULTILINE)}
    assert set(sdtrt_backend.__all__) <= documented


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    """And loads nothing from elsewhere."""
    run = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    pages = {path.relative_to(tmp_path).parts[0]: path.read_text() for path in tmp_path.rglob("index.html")}
    assert {"index.html", "reference", "lora", "options"} <= pages.keys()
    assert "sdtrt calibrate" in (tmp_path / "reference" / "command-line" / "index.html").read_text()
    assert "calibration_runs" in (tmp_path / "reference" / "python" / "index.html").read_text()
    for text in pages.values():
        assert not re.findall(r"<(?:script|img|iframe)[^>]*src=.?https?:|<link[^>]*stylesheet[^>]*href=.?https?:", text)


def test_spelling():
    told = ("README.md", "CONTRIBUTING.md", "docs", "src", "tests", "examples", "benchmarks", "model", "mkdocs.yml", "Makefile")
    run = subprocess.run([sys.executable, "-m", "codespell_lib", "--skip", "*.safetensors,*.json,*.png,*.svg,*.html",
                          "--ignore-words-list", "percentil", *told],  # an option that there is not
                         cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 6000


def test_the_table_of_options_has_each_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| (\S.*?) \|", (ROOT / "docs" / "options.md").read_text(), re.MULTILINE)
    fields = {name: field.default for name, field in Options.__dataclass_fields__.items() if name != "precision"}
    assert dict(rows).keys() == fields.keys()
    for name, shown in rows:
        value = fields[name]
        plain = ast.literal_eval(shown.strip("`")) if re.match(r"`?[\[\d]|`?(True|False)", shown) else shown.strip("`")
        assert plain == ("none" if value is None else list(value) if isinstance(value, tuple) else value), name


def test_python_is_python():
    found = [block for page in PAGES for block in blocks(page.read_text()) if not block.startswith(COMMANDS)]
    assert len(found) >= 10
    for block in found:
        ast.parse(block)


@pytest.mark.slow
def test_the_first_program_of_the_readme_runs(monkeypatch, tmp_path, capsys):
    """Word for word, but with a small random SDXL on the CPU, few steps, and the lowering that needs no compiler."""
    from diffusers import StableDiffusionXLPipeline

    torch._dynamo.reset()
    (program,) = [block for block in blocks((ROOT / "README.md").read_text()) if "from_pretrained" in block]
    pipe = sdxl()
    given = []
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_pretrained", lambda name, dtype: given.append((name, dtype)) or pipe)
    monkeypatch.setattr(StableDiffusionXLPipeline, "to", lambda self, device: given.append(device))
    monkeypatch.setattr(sdtrt_backend, "accelerate", functools.partial(sdtrt_backend.accelerate, engine="reference"))
    monkeypatch.chdir(tmp_path)
    exec(program.replace("pipe(prompt)", "pipe(prompt, num_inference_steps=3)"), {})
    assert given == [("stabilityai/stable-diffusion-xl-base-1.0", torch.float16), "cuda"]
    assert {path.name for path in tmp_path.iterdir()} == {"a lighthouse.png", "a red bicycle.png", "a bowl of soup.png"}
    assert "state: ready" in capsys.readouterr().out
    sdtrt_backend.restore(pipe)


SAYING = {"say", "refuse", "_refused"}  # calls whose arguments are sentences
RETURNING = {"unfit", "in_pieces", "_refusal", "missing", "_on_the_cpu", "_on_a_gpu", "_by_tensorrt", "_by_torchao", "_of_sizes",
             "_called_once", "_calibrate_again", "none_left"}  # functions that give some


def literal_parts(node):
    """Those of a text between what is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values).split("\0")
    return []


def sentences():
    for path in (ROOT / "src" / "sdtrt_backend").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found = []
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in SAYING:
                found = node.args
            elif isinstance(node, ast.FunctionDef) and node.name in RETURNING:
                found = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) or (
                    isinstance(n, ast.Expr) and isinstance(n.value, ast.Yield))]
                found = [n.value if isinstance(n, ast.Yield) else n for n in found]
            elif isinstance(node, ast.keyword) and node.arg in RETURNING and isinstance(node.value, ast.Lambda):
                found = [node.value.body]
            yield from (parts for one in found if (parts := literal_parts(one)))


def test_what_a_report_says_is_explained():
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
    longest = {max(parts, key=len).strip(" ;:,(") for parts in sentences()}
    assert len(longest) > 40
    assert not sorted(part for part in longest if part not in page)
