"""Charts: their numbers are right, different numbers have different colours, names and scales are there to read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.collections import FillBetweenPolyCollection, QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.text import Text

from sdtrt_backend import heatmaps, stats
from sdtrt_backend.calibrate import Calibration, observed
from sdtrt_backend.errors import SdtrtError
from sdtrt_backend.options import Options
from sdtrt_backend.recipe import LayerRecipe, Recipe
from sdtrt_backend.report import charts_html, save_charts
from sdtrt_backend.values import INT8_MAX, LayerReport

STEPS = (999.0, 500.0, 1.0)


def make_recipe(**groups):
    """group -> (rows of max, min, sum, count; amax)."""
    tables = {g: torch.tensor(rows) for g, (rows, _) in groups.items()}
    layers = {g: LayerRecipe("linear", "", g, amax) for g, (_, amax) in groups.items()}
    layers["twin"] = LayerRecipe("linear", "", next(iter(groups)), groups[next(iter(groups))][1])
    return Recipe("", layers, {}, tables, STEPS)


@pytest.fixture
def by_hand():
    return make_recipe(narrow=([[2.0, 1.0, 6.0, 4.0]] * 3, 2.0),
                       wide=([[8.0, 4.0, 24.0, 4.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 3.0, 4.0]], 4.0))


def written(figure):
    """Every text that is drawn."""
    heatmaps.picture(figure)
    return {text.get_text() for text in figure.findobj(Text) if text.get_visible()}


def test_ranges_are_those_of_the_recipe_and_a_timestep_that_did_not_run_is_empty(by_hand):
    narrow, wide = heatmaps.ranges(by_hand)
    assert narrow.layers == ("narrow", "twin")
    assert (wide.clip, wide.timesteps) == (4.0, STEPS)
    np.testing.assert_array_equal(wide.maximum, [8.0, math.nan, 1.0])
    np.testing.assert_array_equal(wide.mean, [6.0, math.nan, 0.75])
    np.testing.assert_array_equal(wide.minimum, [4.0, math.nan, 0.5])
    assert [r.layers[0] for r in heatmaps.widest_first([narrow, wide])] == ["wide", "narrow"]
    np.testing.assert_allclose(heatmaps.reach([narrow, wide]).values, [[0, 0, 0], [1, math.nan, -2]])


def test_the_clipping_value_of_a_smoothed_input_is_that_of_its_widest_channel():
    recipe = make_recipe(a=([[2.0, 1.0, 6.0, 4.0]] * 3, 0.5))
    smoothed = Recipe("", recipe.layers, {"a": torch.tensor([1.0, 4.0])}, recipe.amax_by_timestep, STEPS)
    (r,) = heatmaps.ranges(smoothed)
    assert (r.clip, r.smoothed) == (2.0, True)


def test_a_pattern_chooses_layers_and_a_wrong_one_says_what_there_is(by_hand):
    (only,) = heatmaps.ranges(by_hand, "tw*")
    assert only.layers == ("narrow", "twin")
    with pytest.raises(SdtrtError, match=r"no layer matches 'x\*'.*for example narrow, wide"):
        heatmaps.ranges(by_hand, "x*")
    with pytest.raises(SdtrtError, match="no ranges by timestep"):
        heatmaps.ranges(Recipe("", by_hand.layers))


def test_layers_that_stay_unquantised_by_name_are_drawn_only_when_asked_for():
    recipe = make_recipe(conv_in=([[2.0, 1.0, 6.0, 4.0]] * 3, 2.0), mid=([[2.0, 1.0, 6.0, 4.0]] * 3, 2.0))
    del recipe.layers["twin"]
    assert [r.layers for r in heatmaps.ranges(recipe)] == [("mid",)]
    assert [r.layers for r in heatmaps.ranges(recipe, "conv_in")] == [("conv_in",)]


def test_noise_is_that_of_each_layer_alone_at_each_timestep(denoiser):
    def arguments(timestep):
        noise = torch.Generator().manual_seed(timestep)
        return (torch.randn(2, 4, 8, 8, generator=noise), torch.tensor(timestep)), {
            "encoder_hidden_states": torch.randn(2, 5, 64, generator=noise)}

    calls = [arguments(t) for t in (999, 500, 1)]
    calibration = Calibration()
    with torch.no_grad(), observed(denoiser, calibration):
        for args, kwargs in calls:
            denoiser(*args, **kwargs)
    recipe = calibration.recipe(Options(alpha=None), {})
    rows = [LayerReport(n, op, (), "int8", "", "", recipe.layers[n].amax) for n, op in (("conv1", "conv2d"), ("to_q", "linear"))]
    kept = [LayerReport("conv_in", "conv2d", (), "float32", "", "first"), LayerReport("gone", "linear", (), "int8", "", "", 1.0)]
    grid = heatmaps.noise_by_timestep(denoiser, recipe, [*rows, *kept], calls)
    assert (grid.rows, grid.columns) == (("conv1", "to_q"), (999.0, 500.0, 1.0))
    assert not any(m._forward_pre_hooks for m in denoiser.modules())

    seen = {}
    handle = denoiser.to_q.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    with torch.no_grad():
        denoiser(*calls[1][0], **calls[1][1])
    handle.remove()
    w = denoiser.to_q.weight.detach()
    scale = stats.weight_scale(w)
    x8 = stats.fake_quantize(seen["x"], recipe.layers["to_q"].amax / INT8_MAX)
    y8 = x8 @ (stats.quantize_weight(w, scale) * scale[:, None]).T
    assert grid.values[1, 1] == pytest.approx(stats.sqnr_db(y8, seen["x"] @ w.T), abs=0.01)
    assert heatmaps.noise_chart(grid).image.width == 1000


@pytest.mark.parametrize("rotations", [(True, False), (False, True), (True, True)])
def test_the_noise_of_a_rotated_layer_is_that_of_the_rotated_one(rotations):
    layer, x = torch.nn.Linear(128, 64), torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    x[..., 3] *= 40  # an outlier, which a rotation shares among channels
    module, calibration = torch.nn.Sequential(layer), Calibration()
    with torch.no_grad(), observed(module, calibration):
        module(x)
    recipe = calibration.recipe(Options(alpha=None), {})
    row = LayerReport("0", "linear", (), "int8", "", "", 1.0, rotations=rotations)
    (found,) = heatmaps.noise_by_timestep(module, recipe, [row], [((x,), {})]).values[0]
    rotated, turned = rotations
    amax = recipe.layers["0"].rotated_amax if rotated else recipe.layers["0"].amax
    w = stats.rotate(layer.weight.detach(), 1) if rotated else layer.weight.detach()
    w = stats.rotate(w, 0) if turned else w
    x8 = stats.fake_quantize(stats.rotate(x) if rotated else x, amax / INT8_MAX)
    scale = stats.weight_scale(w)
    y8 = x8 @ (stats.quantize_weight(w, scale) * scale[:, None]).T
    y = x @ layer.weight.detach().T
    assert found == pytest.approx(stats.sqnr_db(stats.rotate(y8) if turned else y8, y), abs=0.02)


def test_a_heat_map_colours_by_value_and_writes_names_timesteps_and_scale():
    grid = heatmaps.Grid(("one.layer", "another"), STEPS, np.array([[10.0, 20.0, 30.0], [10.0, math.nan, 50.0]]))
    figure = heatmaps.heat_map(grid, "a title", "dB", 10, 30)
    assert {"one.layer", "another", "a title", "dB", "999", "500", "1", "10", "30", "timestep, noisiest first"} <= written(figure)
    cells = figure.axes[0].findobj(QuadMesh)[0]
    low, middle, high, again, none, beyond = map(tuple, cells.get_facecolors())
    assert len({low, middle, high}) == 3
    assert (again, beyond) == (low, high)  # beyond the scale as at its end
    assert none[3] == 0  # so that what lies behind is seen
    image, gap = heatmaps.picture(figure), tuple(round(255 * c) for c in to_rgb(heatmaps.GAP))
    assert image.mode == "RGB"
    assert gap in {colour for _, colour in image.getcolors(1 << 20)}
    top, bottom = (figure.axes[0].transData.transform((0.5, y))[1] for y in (0.5, 1.5))
    assert top > bottom  # the first layer is above the second


def test_of_too_many_layers_the_lowest_are_shown_and_the_title_says_so():
    rows = heatmaps.MAX_ROWS + 5
    grid = heatmaps.Grid(tuple(f"layer{r}" for r in range(rows)), (1.0,), np.arange(rows, dtype=float)[::-1, None])
    texts = written(heatmaps.heat_map(grid, "noise", "dB", 0, 1))
    assert f"noise; the lowest {heatmaps.MAX_ROWS} of {rows} layers" in texts
    assert "layer0" not in texts
    assert f"layer{rows - 1}" in texts


def test_a_range_chart_shows_the_three_lines_the_clipping_value_and_its_axes(by_hand):
    figure = heatmaps.range_charts(heatmaps.ranges(by_hand))
    assert {"narrow and 1 more", "wide", "max over calls", "mean", "min", "clipped beyond", "8", "0"} <= written(figure)
    _, wide = figure.axes
    lines = {line.get_color(): line.get_xydata().tolist() for line in wide.findobj(Line2D) if line in wide.lines}
    assert lines[heatmaps.MAXIMUM] == [[999.0, 8.0], [1.0, 1.0]]  # it did not run at the timestep between them
    assert lines[heatmaps.MEAN] == [[999.0, 6.0], [1.0, 0.75]]
    assert lines[heatmaps.MINIMUM] == [[999.0, 4.0], [1.0, 0.5]]
    assert [y for _, y in lines[heatmaps.CLIP]] == [4.0, 4.0]
    assert wide.findobj(FillBetweenPolyCollection)
    assert wide.get_xlim()[0] > wide.get_xlim()[1]  # noisiest first


def test_panels_without_a_layer_are_empty(by_hand):
    found = heatmaps.ranges(by_hand) * 2
    figure = heatmaps.range_charts(found)
    assert [axes.axison for axes in figure.axes] == [True] * 4 + [False] * 2


def test_a_page_of_charts_needs_nothing_else(by_hand, tmp_path):
    charts = heatmaps.range_pages(by_hand)
    page = charts_html("Ranges of <mine>", charts)
    assert page.count("data:image/png;base64,") == len(charts) == 2
    assert "http" not in page
    assert "&lt;mine&gt;" in page
    assert all(f.stat().st_size > 1000 for f in save_charts(tmp_path, charts))
    asked = heatmaps.range_pages(by_hand, "wide")
    assert "a name matches wide" in asked[1].text
