"""What is installed: wheels with what belongs in them, and a core that needs PyTorch and little else."""

import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sdtrt_backend
from sdtrt_backend import command, pipeline

ROOT = Path(__file__).resolve().parents[1]
NOT_IN_THE_CORE = ("diffusers", "transformers", "typer", "rich", "PIL", "torchao", "onnx", "accelerate")
ONE_LINE = """
import sys
sys.path[:0] = [{folder!r}]
import importlib.util, torch
from torch import nn
assert not [name for name in {absent!r} if importlib.util.find_spec(name)]
module = nn.Module()
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
    def forward(self, x, timestep):
        return self.last(torch.relu(self.first(x))) + timestep / 1000
block = Block().eval()
compiled = torch.compile(block, backend="sd_int8", options={{"engine": "reference"}})
with torch.no_grad():
    for _ in range(3):
        for t in (900., 500., 100.):
            compiled(torch.randn(2, 8, 64), torch.tensor(t))
import sdtrt_backend
print(sdtrt_backend.__file__, sdtrt_backend.explain(compiled), sep="\\n")
try:
    sdtrt_backend.demo_pipeline()
except sdtrt_backend.ModelError as error:
    print(error)
from sdtrt_backend.command import main
main()
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    for project, what in ((ROOT, ()), (ROOT / "model", ("--wheel",))):  # the first from its source distribution
        run = subprocess.run([sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", folder, project],
                             capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    return {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def requirements(name):
    """Names of all that a distribution needs, without extras."""
    found, waiting = set(), [name]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += [r.name for text in metadata.requires(one) or () for r in [Requirement(text)]
                        if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.slow
def test_the_wheel_has_the_package_and_the_model_is_a_wheel_of_its_own(wheels):
    mine, model = names(wheels["sdtrt_backend"]), names(wheels["sdtrt_backend_model"])
    sources = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src/sdtrt_backend").rglob("*.py")}
    assert mine == sources | {"sdtrt_backend/py.typed"}
    assert model == {str(p.relative_to(ROOT / "src")) for p in pipeline.ASSETS.rglob("*") if p.is_file()}
    assert wheels["sdtrt_backend"].stat().st_size < 2**20
    versions = {path.name.split("-")[1] for path in wheels.values()}
    assert versions == {metadata.version("sdtrt_backend")}


@pytest.mark.slow
def test_the_source_distribution_has_what_its_tests_and_docs_need_but_for_the_model(wheels):
    (source,) = wheels["sdtrt_backend"].parent.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    own = {str(path.relative_to(ROOT)) for folder in ("src", "tests", "docs", "examples") for path in (ROOT / folder).rglob("*")
           if path.is_file() and path.suffix != ".pyc" and pipeline.ASSETS not in path.parents}
    assert own | {"README.md", "LICENSE", "NOTICE", "Makefile", "constraints.txt", "mkdocs.yml", "pyproject.toml"} <= held
    assert not [name for name in held if name.startswith("src/sdtrt_backend/assets")]


@pytest.mark.slow
def test_the_one_line_works_where_only_the_core_is_installed(wheels, tmp_path):
    core = tmp_path / "core"
    core.mkdir()
    for name in requirements("sdtrt_backend") - {"sdtrt_backend"}:
        distribution = metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__")}:
            if not (core / top).exists():
                (core / top).symlink_to(distribution.locate_file(top))
    with zipfile.ZipFile(wheels["sdtrt_backend"]) as archive:
        archive.extractall(core)
    script = ONE_LINE.format(folder=str(core), absent=NOT_IN_THE_CORE)
    run = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert str(core) in run.stdout.splitlines()[0], run.stderr
    assert "state: ready" in run.stdout
    assert "8-bit layer" in run.stdout
    assert "pip install sdtrt_backend_model" in run.stdout
    assert run.returncode == command.NOT_INSTALLED
    assert run.stderr.endswith("pip install 'sdtrt_backend[cli]'\n")


def test_types_are_declared():
    assert (Path(sdtrt_backend.__file__).parent / "py.typed").exists()
