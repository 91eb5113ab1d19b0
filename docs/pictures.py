"""Draw the pictures of the formats: `python docs/pictures.py` writes docs/images/*.svg.

What they show is computed by the package, and a test draws them again. They are narrow, so that a telephone can show
them, and have a light and a dark form.
"""

from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np

import mxfp4np
from mxfp4np.format import BLOCK_SIZE, BYTES_PER_BLOCK, RULES, element_values

IMAGES = Path(__file__).parent / "images"
WIDTH = 500
STYLE = """
text { font: 15px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
.small { font-size: 13px }
.left { text-anchor: start }
.code { font-family: ui-monospace, monospace }
.quiet { fill: #57606a }
rect { stroke: #57606a; stroke-width: 1 }
path, line { stroke: #57606a; fill: none }
.a { fill: #dbeafe }
.b { fill: #fde7c8 }
.c { fill: #d9f2dd }
.none { fill: none }
.thick { stroke-width: 2.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .quiet { fill: #9da7b3 }
  rect, path, line { stroke: #9da7b3 }
  .a { fill: #1d3a5f }
  .b { fill: #5c3d10 }
  .c { fill: #1c4a2b }
}
"""


class Picture:
    """A drawing of a fixed width that grows line by line."""

    def __init__(self, title: str) -> None:
        self._title, self._items, self.height = title, [], 0.0

    def box(self, x: float, y: float, width: float, height: float, kind: str, text: str = "", font: str = "") -> None:
        """Draw a rectangle with text in its middle."""
        self._items.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>')
        if text:
            self.text(x + width / 2, y + height / 2 + 5, text, font)
        self.height = max(self.height, y + height)

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        """Write text whose baseline is at ``y``."""
        self._items.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>')
        self.height = max(self.height, y + 4)

    def line(self, *points: tuple[float, float], kind: str = "") -> None:
        """Draw a line through points."""
        path = " ".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
        self._items.append(f'<path class="{kind}" d="{path}"/>')
        self.height = max(self.height, *(y for _, y in points))

    def svg(self) -> str:
        """Return the file's text."""
        size = f'viewBox="0 0 {WIDTH} {self.height + 6:g}" width="{WIDTH}" height="{self.height + 6:g}"'
        begin = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(self._title)}">'
        return "\n".join([begin, f"<style>{STYLE}</style>", *self._items, "</svg>", ""])


def number(value: float) -> str:
    """Return a number with a true minus sign."""
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def block() -> Picture:
    """Draw one block: its scale, its bytes, and the values of the first two."""
    codes = np.array([0x2B, 0x71] + [(37 * i + 66) % 256 for i in range(14)], np.uint8)
    scale = np.array([128], np.uint8)
    values = mxfp4np.decode(codes[None], scale, "float32")
    elements = element_values("E2M1")
    picture = Picture("A block of MXFP4: one byte of scale, and 16 bytes of codes for 32 values")
    picture.text(20, 22, "scale, 1 byte", "small left")
    picture.text(20, 82, "codes, 16 bytes", "small left")
    picture.box(20, 30, 29, 28, "b", f"{scale[0]:02X}", "code")
    picture.text(62, 49, f"E8M0: the factor is 2^({scale[0]} \N{MINUS SIGN} 127) = {2.0 ** (scale[0] - 127):g}", "left")
    for i, code in enumerate(codes):
        picture.box(20 + 29 * i, 90, 29, 28, "a" if i < 2 else "none", f"{code:02X}", "code small")
    picture.line((20, 118), (20, 150))
    picture.line((78, 118), (480, 150))
    for i, code in enumerate(codes[:2]):
        left = 20 + 232 * i
        for high in (True, False):
            x, nibble = left + (0 if high else 114), int(code) >> 4 if high else int(code) & 15
            picture.box(
                x, 150, 114, 30, "c" if high else "a", f"{nibble >> 3} {nibble >> 1 & 3:02b} {nibble & 1}", "code"
            )
            picture.text(x + 57, 198, "high nibble" if high else "low nibble", "small quiet")
            element = 2 * i + high
            picture.text(x + 57, 224, f"element {element}", "small")
            picture.text(x + 57, 246, f"{number(elements[nibble])} \N{MULTIPLICATION SIGN} 2", "")
            picture.text(x + 57, 268, f"= {number(values[element])}", "")
    picture.text(WIDTH / 2, 296, "E2M1: 1 bit of sign, 2 of exponent, 1 of mantissa", "small quiet")
    return picture


def nibbles() -> Picture:
    """Draw which elements are in the two nibbles of each byte, in both orders."""
    picture = Picture("Which elements lie in the nibbles of the 16 bytes of a block")
    for row, (order, where) in enumerate((("pairs", "all safetensors layouts"), ("halves", "GGUF"))):
        top = 30 + 128 * row
        picture.text(20, top, f"“{order}”: {where}", "left")
        elements = np.zeros((BYTES_PER_BLOCK, 2), int)
        for i in range(BYTES_PER_BLOCK):
            for high in (0, 1):
                codes = np.zeros((1, BYTES_PER_BLOCK), np.uint8)
                codes[0, i] = 2 << 4 * high
                packed = mxfp4np.MXFP4Array(codes, np.array([127], np.uint8), order)
                elements[i, high] = packed.decode("float32").argmax()
        for i, (low, high) in enumerate(elements):
            x = 20 + 29 * i
            picture.text(x + 14.5, top + 20, str(i), "small quiet")
            picture.box(x, top + 26, 29, 26, "c", str(high), "small")
            picture.box(x, top + 52, 29, 26, "a", str(low), "small")
    picture.box(20, 262, 20, 16, "c")
    picture.text(48, 275, "high nibble", "small left")
    picture.box(160, 262, 20, 16, "a")
    picture.text(188, 275, "low nibble", "small left")
    picture.text(300, 275, "small numbers: bytes", "small left quiet")
    return picture


def rules() -> Picture:
    """Draw the scale that each rule gives to a block, by the largest magnitude in it."""
    picture = Picture("The scale that each rule chooses, by the largest magnitude in a block")
    grid = np.linspace(4, 8, 1025, dtype=np.float32)
    x = np.zeros((grid.size, BLOCK_SIZE), np.float32)
    x[:, 0] = grid
    left, right = 74.0, 480.0

    def at(value: float) -> float:
        return left + (right - left) * (value - 4) / 4

    for row, rule in enumerate(RULES):
        top = 30 + 46 * row
        packed = mxfp4np.encode(x, rule)
        exponent = packed.scales[:, 0].astype(int) - 127
        decoded = packed.decode("float32")[:, 0]
        picture.text(16, top + 22, rule, "left code")
        edges = [0, *(np.flatnonzero(np.diff(exponent)) + 1).tolist(), grid.size - 1]
        for begin, end in pairwise(edges):
            e, width = exponent[begin], at(grid[end]) - at(grid[begin])
            picture.box(at(grid[begin]), top, width, 32, "ac"[int(e > 0)], f"2^{e}" if width > 40 else "")
        over = grid[(decoded == 6) & (grid > 6) & (exponent == 0)]
        if over.size:
            picture.line((at(6), top + 36), (at(float(over[-1])), top + 36), kind="thick")
    base = 30 + 46 * len(RULES)
    for value in range(4, 9):
        picture.line((at(value), base), (at(value), base + 6))
        picture.text(at(value), base + 22, str(value), "small")
    picture.text((left + right) / 2, base + 44, "largest magnitude in the block, times any power of two", "small")
    picture.line((74, base + 62), (104, base + 62), kind="thick")
    picture.text(112, base + 67, "saturates: what is larger than 6 becomes 6", "small left quiet")
    picture.text(16, 18, "scale by rule", "small left quiet")
    return picture


def tiles() -> Picture:
    """Draw which values share a scale in each format."""
    picture = Picture("Which values of a matrix share a scale")
    shapes = [
        ("FP8, tiles", "128 x 128", 2, 3),
        ("FP8, channels", "a row", 6, 1),
        ("FP8, tensor", "all of it", 1, 1),
        ("MXFP4, MXFP8", "32 of a row", 6, 3),
        ("NVFP4", "16 of a row", 6, 6),
    ]
    for i, (name, what, rows, columns) in enumerate(shapes):
        x, y = 20 + 160 * (i % 3), 20 + 172 * (i // 3)
        width, height = 138.0, 96.0
        for row in range(rows):
            for column in range(columns):
                kind = "a" if (row, column) == (0, 0) else "none"
                w, h = width / columns, height / rows
                picture.box(x + column * w, y + row * h, w, h, kind)
        picture.text(x + width / 2, y + 116, name)
        picture.text(x + width / 2, y + 135, what, "small quiet")
    picture.text(409, 220, "NVFP4 has a second", "small")
    picture.text(409, 238, "scale above these:", "small")
    picture.text(409, 256, "one for the tensor,", "small")
    picture.text(409, 274, "or for each expert", "small")
    return picture


PICTURES = {"block": block, "nibbles": nibbles, "rules": rules, "tiles": tiles}


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (IMAGES / f"{name}.svg").write_text(draw().svg(), "utf-8")
