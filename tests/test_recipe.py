"""A recipe survives the disk to the bit, and every damage is refused with its sentence."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from sdtrt_backend.errors import RecipeError
from sdtrt_backend.recipe import JSON_NAME, SCHEMA, TENSORS_NAME, LayerRecipe, Recipe, fingerprint, model_hash, one_weight


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
    for name in (JSON_NAME, TENSORS_NAME):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {JSON_NAME, TENSORS_NAME}


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
    assert {p.name for p in tmp_path.iterdir()} == {JSON_NAME, TENSORS_NAME}


def damage_json(edit):
    def apply(folder):
        body = json.loads((folder / JSON_NAME).read_text())
        edit(body)
        (folder / JSON_NAME).write_text(json.dumps(body))
    return apply


@pytest.mark.parametrize(("damage", "sentence"), [
    (lambda f: (f / JSON_NAME).write_text((f / JSON_NAME).read_text()[:100]), "truncated or not JSON"),
    (lambda f: (f / JSON_NAME).unlink(), "recipe.json is missing"),
    (lambda f: (f / TENSORS_NAME).unlink(), "recipe.safetensors is missing"),
    (lambda f: (f / TENSORS_NAME).write_bytes((f / TENSORS_NAME).read_bytes()[:-4]), "truncated, edited or of another recipe"),
    (damage_json(lambda b: b["layers"]["b"].update(amax=3.0)), "was edited or damaged"),
    (damage_json(lambda b: b.update(schema=SCHEMA + 1)), "upgrade sdtrt_backend"),
    (damage_json(lambda b: b.pop("schema")), "no schema number"),
    (lambda f: (f / JSON_NAME).write_text("[" * 200_000), "truncated or not JSON"),
    (lambda f: [(f / JSON_NAME).unlink(), (f / JSON_NAME).mkdir()], r"expected the folder of a saved recipe.*recipe\.json"),
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
