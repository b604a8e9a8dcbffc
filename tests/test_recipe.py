"""A recipe survives the disk to the bit, and every damage is refused with its sentence."""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save

from sdtrt_backend.errors import RecipeError
from sdtrt_backend.recipe import JSON_NAME, SCHEMA, LayerRecipe, Recipe, digest, fingerprint, model_hash, one_weight

# Saves the new recipe over copies of the kept one, in processes that are killed in front of one file operation after the other
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from sdtrt_backend.recipe import Recipe

kept, new, folder = Path(sys.argv[1]), Recipe.load(sys.argv[2]), Path(sys.argv[3])
os.environ["SDTRT_CACHE"] = str(folder / "cache")
Recipe.load(kept).save(folder / "loaded")  # everything that is imported on the way is imported
for point in range(100):
    shutil.copytree(kept, folder / str(point))
    pid = os.fork()
    if pid == 0:
        left = [point]

        def count(event, arguments):
            if event in ("open", "os.rename", "os.remove", "os.listdir", "os.scandir"):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        new.save(folder / str(point))
        os._exit(0)
    if os.waitpid(pid, 0)[1] == 0:
        break
print(point + 1)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path_factory.mktemp("cache")))


def tensors(folder):
    (path,) = folder.glob("recipe-*.safetensors")
    return path


@pytest.fixture
def recipe():
    layers = {"a.to_q": LayerRecipe("linear", "f1", "a.to_q", 1.5, 0.5),
              "a.to_k": LayerRecipe("linear", "f2", "a.to_q", 1.5, 0.5),
              "b": LayerRecipe("conv2d", "f3", "b", 0.1 + 0.2)}
    return Recipe("hash", layers, {"a.to_q": torch.rand(64)}, {"a.to_q": torch.rand(3, 4), "b": torch.rand(3, 4)},
                  (999.0, 500.0, 1.0), {"seed": 0, "rule": "max"})


def test_what_is_loaded_is_what_was_saved_to_the_bit(recipe, tmp_path):
    again = Recipe.load(recipe.save(tmp_path))
    assert (again.layers, again.timesteps, again.provenance) == (recipe.layers, recipe.timesteps, recipe.provenance)
    assert all(torch.equal(again.smoothing[k], v) for k, v in recipe.smoothing.items())
    assert all(torch.equal(again.amax_by_timestep[k], v) for k, v in recipe.amax_by_timestep.items())


def test_saving_twice_gives_the_same_bytes_and_nothing_else(recipe, tmp_path):
    recipe.save(tmp_path / "a")
    Recipe.load(tmp_path / "a").save(tmp_path / "b")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second
    assert set(first) == {JSON_NAME, tensors(tmp_path / "a").name}


def test_threads_that_save_and_load_in_one_folder_never_see_two_recipes_mixed(recipe, tmp_path):
    other = replace(recipe, smoothing={"a.to_q": torch.rand(64)})
    recipe.save(tmp_path)

    def save(mine):
        for _ in range(20):
            mine.save(tmp_path)

    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(save, r) for r in (recipe, other)]
        while not all(w.done() for w in writers):
            Recipe.load(tmp_path)
    assert [w.result() for w in writers] == [None, None]
    factor = Recipe.load(tmp_path).smoothing["a.to_q"]
    assert any(torch.equal(factor, r.smoothing["a.to_q"]) for r in (recipe, other))
    assert {p.name for p in tmp_path.iterdir()} == {JSON_NAME, tensors(tmp_path).name}


def save_as_schema_1(recipe, folder):
    """What was written before the tensors' file was named by its content."""
    blob = save({**{f"smoothing/{k}": v for k, v in recipe.smoothing.items()},
                 **{f"amax/{k}": v for k, v in recipe.amax_by_timestep.items()}})
    body = {"schema": 1, "model_hash": recipe.model_hash, "timesteps": list(recipe.timesteps),
            "provenance": dict(recipe.provenance), "layers": {name: asdict(layer) for name, layer in recipe.layers.items()},
            "tensors_sha256": hashlib.sha256(blob).hexdigest()}
    body["sha256"] = digest(body)
    (folder / "recipe.safetensors").write_bytes(blob)
    (folder / JSON_NAME).write_text(json.dumps(body))


def test_a_recipe_of_schema_1_is_loaded_and_replaced(recipe, tmp_path):
    save_as_schema_1(recipe, tmp_path)
    again = Recipe.load(tmp_path)
    assert again.layers == recipe.layers
    assert again.content_hash() == recipe.content_hash()
    again.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {JSON_NAME, tensors(tmp_path).name}
    assert Recipe.load(tmp_path).content_hash() == recipe.content_hash()


def test_a_recipe_of_schema_2_is_loaded_and_its_layers_have_no_role(recipe, tmp_path):
    recipe.save(tmp_path)
    body = json.loads((tmp_path / JSON_NAME).read_text())
    for layer in body["layers"].values():
        assert layer.pop("role") == ""
    body = {**body, "schema": 2}
    del body["sha256"]
    (tmp_path / JSON_NAME).write_text(json.dumps({**body, "sha256": digest(body)}))
    assert Recipe.load(tmp_path).content_hash() == recipe.content_hash()


def test_ranges_of_weights_survive_the_disk_and_schema_3_has_none(recipe, tmp_path):
    named = replace(recipe, weight_amax={"a.to_q": torch.tensor([0.5, 1.5])}, parts={"controlnet": replace(
        recipe, smoothing={}, amax_by_timestep={}, weight_amax={"b": torch.tensor([2.0])})})
    again = Recipe.load(named.save(tmp_path))
    assert again.content_hash() == named.content_hash() != recipe.content_hash()
    assert again.weight_amax["a.to_q"].tolist() == [0.5, 1.5]
    assert again.parts["controlnet"].weight_amax["b"].tolist() == [2.0]
    recipe.save(tmp_path)
    body = json.loads((tmp_path / JSON_NAME).read_text()) | {"schema": 3}
    del body["sha256"]
    (tmp_path / JSON_NAME).write_text(json.dumps({**body, "sha256": digest(body)}))
    assert Recipe.load(tmp_path).weight_amax == {}


def test_the_content_hash_is_of_all_that_is_saved_and_survives_the_disk(recipe, tmp_path):
    others = [replace(recipe, timesteps=(999.0,)), replace(recipe, smoothing={}), replace(recipe, provenance={"seed": 1}),
              replace(recipe, layers={**recipe.layers, "b": replace(recipe.layers["b"], keep="a reason")}),
              replace(recipe, amax_by_timestep={**recipe.amax_by_timestep, "b": torch.zeros(3, 4)})]
    hashes = [r.content_hash() for r in (recipe, *others)]
    assert len(set(hashes)) == len(hashes)
    assert [Recipe.load(r.save(tmp_path)).content_hash() for r in (recipe, *others)] == hashes


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of a process")
@pytest.mark.parametrize("schema", [1, SCHEMA])
def test_killed_at_any_point_the_recipe_before_or_the_new_one_is_there(recipe, tmp_path, schema):
    new = replace(recipe, smoothing={"a.to_q": torch.rand(64)})
    kept, made = tmp_path / "kept", tmp_path / "new"
    kept.mkdir()
    save_as_schema_1(recipe, kept) if schema == 1 else recipe.save(kept)
    new.save(made)
    done = subprocess.run([sys.executable, "-c", KILLED, str(kept), str(made), str(tmp_path)], capture_output=True, text=True,
                          check=True)
    points = int(done.stdout)
    assert points > 8
    found = [Recipe.load(tmp_path / str(i)).content_hash() for i in range(points)]
    assert found[0] == recipe.content_hash()
    assert found[-1] == new.content_hash()
    assert found == sorted(found, key=found.index)  # once it is the new one, it stays so
    assert len(set(found)) == 2
    for i in range(points):
        new.save(tmp_path / str(i))
        assert {p.name for p in (tmp_path / str(i)).iterdir()} == {JSON_NAME, tensors(tmp_path / str(i)).name}


def test_a_save_that_is_interrupted_leaves_what_was_there_and_no_litter(recipe, tmp_path, killed_before):
    recipe.save(tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    with killed_before(JSON_NAME):
        replace(recipe, timesteps=(1.0,)).save(tmp_path)
    assert Recipe.load(tmp_path).content_hash() == recipe.content_hash()
    assert {p.name for p in tmp_path.iterdir()} == before


def test_a_recipe_that_is_only_read_needs_no_cache_folder(recipe, tmp_path, monkeypatch):
    recipe.save(tmp_path / "recipe")
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path / "file" / "cache"))
    assert Recipe.load(tmp_path / "recipe").content_hash() == recipe.content_hash()
    replace(recipe, smoothing={}).save(tmp_path / "recipe")  # without a lock nothing is removed, as another may read it
    assert len(list((tmp_path / "recipe").glob("*.safetensors"))) == 2
    assert Recipe.load(tmp_path / "recipe").smoothing == {}


def resealed(edit):
    """Edited, with a checksum that fits."""
    def apply(folder):
        body = json.loads((folder / JSON_NAME).read_text())
        del body["sha256"]
        edit(body)
        (folder / JSON_NAME).write_text(json.dumps({**body, "sha256": digest(body)}))
    return apply


def damage_json(edit):
    def apply(folder):
        body = json.loads((folder / JSON_NAME).read_text())
        edit(body)
        (folder / JSON_NAME).write_text(json.dumps(body))
    return apply


@pytest.mark.parametrize(("damage", "sentence"), [
    (lambda f: (f / JSON_NAME).write_text((f / JSON_NAME).read_text()[:100]), "truncated or not JSON"),
    (lambda f: (f / JSON_NAME).unlink(), "recipe.json is missing"),
    (lambda f: tensors(f).unlink(), r"recipe-[0-9a-f]{64}\.safetensors is missing"),
    (lambda f: tensors(f).write_bytes(tensors(f).read_bytes()[:-4]), "truncated, edited or of another recipe"),
    (resealed(lambda b: b.pop("layers")), "has not the form of its schema"),
    (resealed(lambda b: b.pop("tensors_sha256")), "has not the form of its schema"),
    (resealed(lambda b: b.update(tensors_sha256="../../x")), "has not the form of its schema"),
    (resealed(lambda b: b["layers"]["b"].update(novel=1)), "has not the form of its schema"),
    (damage_json(lambda b: b["layers"]["b"].update(amax=3.0)), "was edited or damaged"),
    (damage_json(lambda b: b.update(schema=SCHEMA + 1)), "upgrade sdtrt_backend"),
    (damage_json(lambda b: b.pop("schema")), "no schema number"),
    (lambda f: (f / JSON_NAME).write_text("[" * 200_000), "truncated or not JSON"),
    (lambda f: [(f / JSON_NAME).unlink(), (f / JSON_NAME).mkdir()], r"recipe\.json cannot be read.*calibrate again"),
])
def test_damage_is_refused_with_its_sentence(recipe, tmp_path, damage, sentence):
    recipe.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(RecipeError, match=sentence):
        Recipe.load(tmp_path)


def test_another_model_is_refused_and_the_same_one_is_not(recipe):
    recipe.check_model({"a.to_q": "f1", "a.to_k": "f2", "b": "f3", "new": "f9"})
    with pytest.raises(RecipeError, match="weight of b differs"):
        recipe.check_model({"a.to_q": "f1", "b": "other"})
    with pytest.raises(RecipeError, match="none of its 3 layers"):
        recipe.check_model({"c": "f1"})


def test_a_fingerprint_survives_a_change_of_precision_but_not_of_weights():
    weight = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).half()
    same = {fingerprint(weight), fingerprint(weight.float()), fingerprint(weight.bfloat16())}
    assert len(same) == 1
    assert fingerprint(weight.T.contiguous()) not in same
    assert fingerprint(weight * 1.5) not in same


@pytest.mark.parametrize("scale", [1.0, 1e-5])  # the second: most fp16 weights are subnormal
def test_an_fp32_checkpoint_is_known_in_fp16_and_in_bf16_and_they_in_fp32(scale):
    weight = scale * torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    own = fingerprint(weight)
    assert len({fingerprint(weight.half()), fingerprint(weight.bfloat16())}) == 2
    for dtype in (torch.float16, torch.bfloat16):
        loaded = fingerprint(weight.to(dtype))
        Recipe("", {"a": LayerRecipe("linear", own, "a", 1.0)}).check_model({"a": loaded})
        Recipe("", {"a": LayerRecipe("linear", loaded, "a", 1.0)}).check_model({"a": own})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bf16_checkpoint_is_known_in_every_precision(dtype):
    weight = 1e-5 * torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert one_weight(fingerprint(weight), fingerprint(weight.to(dtype)))
    assert one_weight(fingerprint(weight.to(dtype)), fingerprint(weight.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_fine_tune_is_another_model_in_every_precision(dtype):
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 33, generator=noise)
    tuned = weight + 1e-3 * torch.randn(64, 33, generator=noise)
    recipe = Recipe("", {"a": LayerRecipe("linear", fingerprint(weight), "a", 1.0)})
    with pytest.raises(RecipeError, match=r"another model: the weight of a differs.*fp32 weights fits both.*calibrate this"):
        recipe.check_model({"a": fingerprint(tuned.to(dtype))})


def test_a_model_hash_does_not_depend_on_order():
    assert model_hash([("a", "1"), ("b", "2")]) == model_hash([("b", "2"), ("a", "1")]) != model_hash([("a", "2"), ("b", "1")])


def test_the_path_of_a_file_is_refused_with_a_sentence(recipe, tmp_path):
    with pytest.raises(RecipeError):
        Recipe.load(recipe.save(tmp_path) / JSON_NAME)


def test_where_no_folder_can_be_made_saving_is_refused_with_a_sentence(recipe, tmp_path):
    (tmp_path / "file").touch()
    for impossible in (tmp_path / "file", tmp_path / "file" / "below", "/proc/recipe", "nul\0", 5):
        with pytest.raises(RecipeError, match=r"cannot be saved: expected a folder.*name another"):
            recipe.save(impossible)
    for impossible in ("nul\0", 5, None):
        with pytest.raises(RecipeError, match="expected the folder of a saved recipe"):
            Recipe.load(impossible)


def test_without_modelopt_the_install_line_is_given(recipe, monkeypatch):
    monkeypatch.setattr("sdtrt_backend.errors.find_spec", lambda name: None)
    for use in (Recipe.from_modelopt, recipe.to_modelopt):
        with pytest.raises(ImportError, match=r"modelopt needs nvidia-modelopt.*pip install 'sdtrt_backend\[modelopt\]'"):
            use(torch.nn.Linear(2, 2))
