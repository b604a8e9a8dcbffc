"""Options: every wrong one raises and says what is valid."""

from pathlib import Path

import pytest

from sdtrt_backend.errors import OptionError
from sdtrt_backend.options import Options

WRONG = {
    "recipe": 5, "calibration_runs": 0, "rule": "median", "percentile": 0.0, "alpha": 1.5, "alpha_conv": -1, "max_error": -1.0,
    "rest": "float64", "engine": "tensorrt_classic", "exclude": [3],
    "level": 5, "engine_dir": 7, "weights": "drop", "watch": 1, "min_psnr": 0, "output_psnr": 300, "two_codes": "*ff*",
    "lora_policy": "never", "build_after": 0, "max_sizes": 2.5, "background": 1,
}
OPTIONS = set(Options.__dataclass_fields__) - {"precision"}  # the backend's name, not an option


def test_defaults_are_valid_and_every_option_has_a_wrong_value_here():
    assert Options.parse(None) == Options.parse({}) == Options()
    assert set(WRONG) == OPTIONS


@pytest.mark.parametrize(("name", "value"), WRONG.items())
def test_a_wrong_value_names_the_option_and_what_came(name, value):
    with pytest.raises(OptionError, match=f"{name}.*expects") as caught:
        Options.parse({name: value})
    assert repr(value) in str(caught.value) or repr(tuple(value)) in str(caught.value)


def test_the_smoothing_of_convolutions_alone_may_be_fitted():
    assert Options.parse({"alpha_conv": "fitted"}) == Options()
    with pytest.raises(OptionError, match=r"'alpha_conv' expects a number in \[0, 1\], 'fitted' or None"):
        Options.parse({"alpha_conv": "best"})
    with pytest.raises(OptionError, match=r"'alpha' expects a number in \[0, 1\] or None"):
        Options.parse({"alpha": "fitted"})


@pytest.mark.parametrize("value", [True, "0.5", None])
def test_a_percentile_is_a_number_and_not_a_truth_value(value):
    with pytest.raises(OptionError, match="number in"):
        Options.parse({"percentile": value})


@pytest.mark.parametrize("given", [5, 0, "", ["alpha"], {"alpha"}])
def test_options_that_are_no_dict_are_refused(given):
    with pytest.raises(OptionError, match="options expects a dict"):
        Options.parse(given)


def test_paths_and_lists_become_hashable():
    options = Options.parse({"recipe": Path("a"), "exclude": ["conv*"], "alpha": None})
    assert (options.recipe, options.exclude, options.alpha) == ("a", ("conv*",), None)
    assert hash(options) == hash(Options.parse({"recipe": "a", "exclude": ("conv*",), "alpha": None}))


@pytest.mark.parametrize("name", ["percentil", "Rule", "quantize"])
def test_an_unknown_option_lists_every_valid_one(name):
    with pytest.raises(OptionError, match=f"unknown option '{name}'") as caught:
        Options.parse({name: 1})
    assert all(valid in str(caught.value) for valid in OPTIONS)


@pytest.mark.parametrize(("name", "value"), [
    ("calibration_runs", 2.0), ("calibration_runs", True), ("exclude", "conv*"), ("alpha", "0.5"), ("alpha", True),
    ("rule", None), ("engine", None), ("max_error", float("nan")), ("percentile", float("nan")),
    ("rule", ["max"]), ("level", True), ("level", "3"),
])
def test_a_value_of_nearly_the_right_type_is_refused_too(name, value):
    with pytest.raises(OptionError, match=f"{name}.*expects"):
        Options.parse({name: value})
