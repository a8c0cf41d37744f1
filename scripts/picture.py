# SPDX-License-Identifier: MIT OR Apache-2.0
"""A picture as an SVG with nothing but text, boxes and arrows, readable in light and dark."""

import html

# Light, dark. The colours are distinct for people who do not tell red from green, too.
SCHEMES = [
    {
        "paper": "#ffffff", "ink": "#1c1c1c", "faint": "#595959", "grid": "#dedede", "line": "#555555",
        "blue": "#0b62c4", "orange": "#b4550a", "grey": "#5a5a5a",
        "blue-fill": "#dcebfb", "orange-fill": "#fbe8d7", "grey-fill": "#efefef",
    },
    {
        "paper": "#0f1216", "ink": "#ececec", "faint": "#a6a6a6", "grid": "#2f343b", "line": "#b5b5b5",
        "blue": "#5cabff", "orange": "#f0a04b", "grey": "#b0b0b0",
        "blue-fill": "#15304d", "orange-fill": "#47300f", "grey-fill": "#262a30",
    },
]  # fmt: skip
BASE = (
    "text{font:13px system-ui,sans-serif}.small{font-size:11px}.title{font-size:16px;font-weight:600}"
    ".strong{font-weight:600}.mono{font-family:ui-monospace,monospace;font-size:12px}.grid{stroke-width:1}"
    ".halo{paint-order:stroke;stroke-width:4px}.arrow{fill:none;stroke-width:1.5}.dashed{stroke-dasharray:5 4}"
)


def rules(colours):
    """The style sheet of one scheme."""
    out = [f"text{{fill:{colours['ink']}}}.faint{{fill:{colours['faint']}}}.paper{{fill:{colours['paper']}}}"]
    out.append(f".grid{{stroke:{colours['grid']}}}.halo{{stroke:{colours['paper']}}}")
    out.append(f".arrow{{stroke:{colours['line']}}}.head{{fill:{colours['line']}}}")
    for name in ("blue", "orange", "grey"):
        out.append(f".{name}{{fill:{colours[name]}}}.{name}-line{{fill:none;stroke:{colours[name]}}}")
        out.append(f".{name}-box{{fill:{colours[name + '-fill']};stroke:{colours[name]}}}")
    out.append(f".plain-box{{fill:{colours['paper']};stroke:{colours['line']}}}")
    return "".join(out)


class Picture:
    """Shapes are drawn in the order of the calls. Coordinates are pixels from the upper left corner."""

    def __init__(self, width, height, label, style=""):
        self.out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{html.escape(label)}">',
            f"<style>{BASE}{style}{rules(SCHEMES[0])}"
            f"@media (prefers-color-scheme:dark){{{rules(SCHEMES[1])}}}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto-start-reverse"><path class="head" d="M0 0L8 4L0 8z"/></marker></defs>',
            f'<rect width="{width}" height="{height}" class="paper"/>',
        ]  # fmt: skip

    def text(self, x, y, text, kind="", anchor="start"):
        """A line of text; `y` is its base line."""
        attributes = (f' class="{kind}"' if kind else "") + (
            f' text-anchor="{anchor}"' if anchor != "start" else ""
        )
        self.out.append(f'<text x="{x:g}" y="{y:g}"{attributes}>{html.escape(text, quote=False)}</text>')

    def box(self, x, y, width, height, colour="plain", lines=(), at="middle"):
        """A box with lines of text in its middle, or from its `top`. A line is a text, or a text and its class."""
        self.out.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" class="{colour}-box"/>'
        )
        base = y + 20 if at == "top" else y + height / 2 - (len(lines) - 1) * 8.5 + 4.5
        for number, line in enumerate(lines):
            text, kind = line if isinstance(line, tuple) else (line, "")
            self.text(x + width / 2, base + 17 * number, text, kind, "middle")

    def arrow(self, *points, label="", at=None, anchor="middle", both=False, dashed=False, kind="small"):
        """A line through points with a head at its end. The label is above the middle of the line, or `at` a point."""
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        ends = 'marker-end="url(#head)"' + (' marker-start="url(#head)"' if both else "")
        self.out.append(f'<path class="arrow{" dashed" if dashed else ""}" d="{path}" {ends}/>')
        if label:
            x, y = at or ((points[0][0] + points[-1][0]) / 2, (points[0][1] + points[-1][1]) / 2 - 6)
            for number, line in enumerate(label.split("\n")):
                self.text(x, y + 14 * number, line, f"{kind} halo", anchor)

    def line(self, *points, dashed=False):
        """A line without a head."""
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        self.out.append(f'<path class="arrow{" dashed" if dashed else ""}" d="{path}"/>')

    def svg(self):
        return "\n".join(self.out) + "\n</svg>\n"
