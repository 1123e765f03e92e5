# SPDX-License-Identifier: Apache-2.0
"""`HeatMap`: where in a picture a concept was suppressed, as numbers and as colours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

# viridis, at 0, 1/16, ... 1 (Nathaniel Smith, Stefan van der Walt; CC0): from dark blue to yellow, each step
# lighter than the one before, so that it is read right in gray and by colour-blind eyes.
_VIRIDIS = (
    (68, 1, 84), (72, 24, 106), (71, 45, 123), (66, 64, 134), (59, 82, 139), (51, 99, 141), (44, 114, 142),
    (38, 130, 142), (33, 145, 140), (31, 159, 136), (39, 173, 129), (61, 188, 116), (92, 200, 99),
    (129, 211, 77), (170, 220, 50), (213, 226, 26), (253, 231, 37),
)  # fmt: skip
_CONTRAST = 0.15  # of the picture under the colours: little, so that it is not taken for heat
_SMALLEST = 128  # pixels: what is lower is enlarged, or nobody could read the bar


@dataclass(frozen=True)
class HeatMap:
    """Where a concept was suppressed: gates in [0, 1], averaged over layers and steps, for each resolution of
    the layers.

    Attributes:
        levels: number of queries N -> float32 [N], the queries of a layer row by row.
    """

    levels: dict[int, Tensor]

    def array(self, height: int, width: int) -> Tensor:
        """float32 [height, width] in [0, 1], the mean of all resolutions."""
        maps = []
        for queries, heat in self.levels.items():
            # The grid with this many cells whose shape is closest to the picture's.
            divisors = [r for r in range(1, queries + 1) if queries % r == 0]
            ideal = math.sqrt(queries * height / width)
            rows = min(divisors, key=lambda r: abs(math.log(r / ideal)))
            grid = heat.reshape(1, 1, rows, queries // rows)
            maps.append(F.interpolate(grid, (height, width), mode="bilinear", align_corners=False)[0, 0])
        return torch.stack(maps).mean(0).clamp(0, 1)

    def frames(self, count: int) -> list[HeatMap]:
        """The maps of a video's frames, in their order.

        Args:
            count: latent frames, as the denoiser sees them: of F frames, Wan has (F - 1) / 4 + 1, LTX
                (F - 1) / 8 + 1.

        Raises:
            ValueError: the queries are not those of so many frames.
        """
        for queries in self.levels:
            if count < 1 or queries % count:
                raise ValueError(f"count={count!r}: must be the number of frames of {queries} queries")
        parts = {queries: heat.chunk(count) for queries, heat in self.levels.items()}
        return [HeatMap({len(p[i]): p[i] for p in parts.values()}) for i in range(count)]

    def overlay(self, image: Image) -> Image:
        """The picture in the colours of the map, and right of it the bar that says what they mean.

        The scale is always 0 to 1: a colour is the same gate in every picture. The picture shows through
        as lighter and darker than its own mean, so that colours are the same over a bright and a dark one.

        Args:
            image: any size and mode. One of fewer than 128 pixels in height is enlarged by the smallest whole
                factor that gives it as many.

        Returns:
            RGB, as high as the (enlarged) picture, and wider by a quarter of its height, but at least 48
            pixels and at most 160.
        """
        from PIL import Image as images

        factor = -(-_SMALLEST // image.height) if image.height < _SMALLEST else 1
        size = (image.width * factor, image.height * factor)
        gray = image.convert("L").resize(size, images.Resampling.NEAREST)
        light = torch.frombuffer(bytearray(gray.tobytes()), dtype=torch.uint8).float().reshape(size[::-1])
        shade = _CONTRAST * (light - light.mean())
        shown = colours(self.array(size[1], size[0])) + shade[..., None]
        picture = images.fromarray(shown.round().clamp(0, 255).byte().numpy())
        bar = _bar(size[1])
        sheet = images.new("RGB", (size[0] + bar.width, size[1]), "white")
        sheet.paste(picture, (0, 0))
        sheet.paste(bar, (size[0], 0))
        return sheet


def colours(heat: Tensor) -> Tensor:
    """Numbers in [0, 1], of any shape -> float32 RGB in [0, 255], with a last dimension of 3."""
    table = torch.tensor(_VIRIDIS, dtype=torch.float32)
    place = heat.float().clamp(0, 1) * (len(table) - 1)
    below = place.floor().clamp(max=len(table) - 2)
    return torch.lerp(table[below.long()], table[below.long() + 1], (place - below)[..., None])


def _bar(height: int) -> Image:
    """The scale from 0 at the bottom to 1 at the top, with ticks, on white."""
    from PIL import Image as images
    from PIL import ImageDraw, ImageFont

    width = min(max(height // 4, 48), 160)
    size = width // 4  # of letters, and the width of the coloured part
    top, bottom = size, height - size - 1
    font = ImageFont.load_default(size=size)
    sheet = images.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    left, right = size // 2, size // 2 + size
    shades = colours(torch.linspace(1, 0, bottom - top + 1)).round().int().tolist()
    for row, (red, green, blue) in enumerate(shades, start=top):
        pen.line((left, row, right, row), fill=(red, green, blue))
    pen.rectangle((left, top, right, bottom), outline="black")
    for tick in (0.0, 0.5, 1.0):
        y = bottom - tick * (bottom - top)
        pen.line((right, y, right + size // 3, y), fill="black")
        pen.text((right + size // 2, y), f"{tick:g}", "black", font, anchor="lm")
    return sheet
