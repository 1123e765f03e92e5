# SPDX-License-Identifier: Apache-2.0
"""The heat map: colours that are read right, on a scale that never changes, over any picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastnegate.engine.heat import HeatMap, colours


def even(heat: float) -> HeatMap:
    return HeatMap({64: torch.full((64,), heat)})


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int)


def lightness(rgb: Tensor) -> Tensor:
    """CIE L* of sRGB in [0, 255]."""
    part = rgb.double() / 255
    linear = torch.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    y = linear @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    return torch.where(y > 0.008856, 116 * y ** (1 / 3) - 16, 903.3 * y)


def test_more_is_lighter_and_evenly_so() -> None:
    light = lightness(colours(torch.linspace(0, 1, 257)))
    steps = light[16::16] - light[:-16:16]
    assert (light.diff() > 0).all() and light[-1] - light[0] > 70
    assert steps.max() < 2 * steps.min()


def test_colours_are_those_of_viridis() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    theirs = torch.tensor(matplotlib.colormaps["viridis"].colors) * 255
    assert (colours(torch.linspace(0, 1, 256)) - theirs).abs().max() < 6


def test_the_scale_is_fixed() -> None:
    """A weak map looks weak, whatever else is in the picture."""
    picture = Image.new("RGB", (160, 160), "gray")
    weak, strong = pixels(even(0.1).overlay(picture)), pixels(even(0.9).overlay(picture))
    expected = [colours(torch.tensor(heat)).round().int().tolist() for heat in (0.1, 0.9)]
    assert (weak[:, :160] == expected[0]).all() and (strong[:, :160] == expected[1]).all()
    assert (weak[:, 160:] == strong[:, 160:]).all()  # the bar
    step = torch.zeros(2, 2)
    step[0] = 1.0  # a map that reaches 1 somewhere is no darker elsewhere than one that does not
    both = pixels(HeatMap({4: (0.1 + 0.8 * step).flatten()}).overlay(picture))
    assert (both[-1, 0] == weak[-1, 0]).all() and (both[0, 0] == strong[0, 0]).all()


@pytest.mark.parametrize("ground", ["white", "black", "red"])
def test_colours_do_not_depend_on_how_bright_the_picture_is(ground: str) -> None:
    shown = pixels(even(0.5).overlay(Image.new("RGB", (160, 160), ground)))[:, :160]
    assert (shown == colours(torch.tensor(0.5)).round().int().tolist()).all()


def test_the_picture_shows_through() -> None:
    picture = Image.new("L", (160, 160), 0)
    picture.paste(255, (80, 0, 160, 160))
    shown = pixels(even(0.5).overlay(picture))
    assert shown[0, 100].sum() - shown[0, 20].sum() > 75


def test_the_bar_spans_0_to_1_and_has_ticks() -> None:
    bar = pixels(even(0.0).overlay(Image.new("RGB", (256, 256))))[:, 256:]
    column = bar[:, 12]
    found = np.flatnonzero((column != 255).any(-1))[1:-1]  # within the outline
    table = colours(torch.linspace(1, 0, len(found) + 2))[1:-1].round().int().numpy()
    assert (column[found] == table).all()
    right_of_it = (bar[:, 30:] < 128).all(-1)
    inked = np.flatnonzero(right_of_it.any(1))
    assert np.count_nonzero(np.diff(inked) > 10) == 2  # three labels, apart


@pytest.mark.parametrize(
    ("given", "expected"),
    [((48, 32), (240, 128)), ((160, 160), (208, 160)), ((64, 400), (164, 400)), ((900, 1000), (1060, 1000))],
)
def test_sizes(given: tuple[int, int], expected: tuple[int, int]) -> None:
    assert even(0.3).overlay(Image.new("RGBA", given)).size == expected


def test_the_array_keeps_shape_and_place() -> None:
    heat = torch.zeros(4, 8)
    heat[:, :2] = 1.0
    grid = HeatMap({32: heat.flatten()}).array(16, 32)
    assert grid.shape == (16, 32) and grid[:, :4].min() > 0.9 and grid[:, 16:].max() == 0


def test_a_video_has_a_map_for_each_frame() -> None:
    heat = torch.rand(3, 4, 8)
    video = HeatMap({96: heat.flatten(), 24: torch.full((24,), 0.5)})
    frames = video.frames(3)
    for frame, wanted in zip(frames, heat):
        assert torch.equal(frame.levels[32], wanted.flatten()) and frame.levels[8].tolist() == [0.5] * 8
        torch.testing.assert_close(HeatMap({32: frame.levels[32]}).array(4, 8), wanted)
    assert len(frames) == 3
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"count={count}: must be the number of frames of 96 queries"):
            video.frames(count)
