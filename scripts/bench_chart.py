# SPDX-License-Identifier: MIT OR Apache-2.0
"""Draws latency against throughput as an SVG that is readable in light and dark, with nothing but text."""

import html
import math

WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 74, 690, 64, 396
# light, dark: distinct for those who do not see red and green apart, too
COLOURS = {"raio": ("#0b62c4", "#5cabff"), "nbdkit": ("#b4550a", "#f0a04b"), "local": ("#5a5a5a", "#b0b0b0")}
NAMES = {"raio": "raio", "nbdkit": "nbdkit", "local": "local io_uring, no network"}
DASHES = {"raio": "", "nbdkit": "7 3", "local": "2 3"}


def axis(values, below):
    """The bounds of a logarithmic axis and its ticks: 1, 2, 5 of each decade; the lower end is at most `below` of the least."""
    steps = [m * 10**e for e in range(-1, 9) for m in (1, 2, 5)]
    low = max(s for s in steps if s <= min(values) * below)
    high = min(s for s in steps if s >= max(values) * 1.05)
    return low, high, [s for s in steps if low <= s <= high]


def short(value):
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def svg(curves, caption):
    """`curves`: for each target its points (depth, IOPS, mean latency in µs), by depth."""
    x_low, x_high, x_ticks = axis([iops for points in curves.values() for _, iops, _ in points], 0.95)
    y_low, y_high, y_ticks = axis([us for points in curves.values() for *_, us in points], 0.6)

    def x(iops):
        return LEFT + (RIGHT - LEFT) * math.log(iops / x_low) / math.log(x_high / x_low)

    def y(us):
        return BOTTOM - (BOTTOM - TOP) * math.log(us / y_low) / math.log(y_high / y_low)

    style = ["text{font:13px system-ui,sans-serif}", ".small{font-size:11px}", ".title{font-size:16px;font-weight:600}",
             ".name{font-weight:600}", ".grid{stroke-width:1}", "polyline{stroke-width:2.5}",
             ".halo{paint-order:stroke;stroke-width:4px}"]  # fmt: skip
    for scheme in (0, 1):
        paper, ink, faint, grid = (("#ffffff", "#1c1c1c", "#595959", "#dedede"),
                                   ("#0f1216", "#ececec", "#a6a6a6", "#2f343b"))[scheme]  # fmt: skip
        rules = [f".paper{{fill:{paper}}}", f"text{{fill:{ink}}}", f".faint{{fill:{faint}}}", f".grid{{stroke:{grid}}}",
                 f".halo{{stroke:{paper}}}"]  # fmt: skip
        for name in curves:
            colour = COLOURS[name][scheme]
            rules.append(f".{name}{{fill:{colour}}}polyline.{name}{{fill:none;stroke:{colour}}}")
        style.append("".join(rules) if scheme == 0 else f"@media (prefers-color-scheme:dark){{{''.join(rules)}}}")

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="Mean latency against throughput of 4 KiB random reads at depths 1 to 256">',
        f"<style>{''.join(style)}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" class="paper"/>',
        f'<text class="title" x="{LEFT}" y="26">Latency against throughput: 4 KiB random reads, in the page cache</text>',
        f'<text class="small faint" x="{LEFT}" y="44">Numbers at the points are queue depths. Right and down is better.</text>',
    ]
    for tick in x_ticks:
        out.append(f'<path class="grid" d="M{x(tick):.1f} {TOP}V{BOTTOM}"/>')
        out.append(f'<text x="{x(tick):.1f}" y="{BOTTOM + 20}" text-anchor="middle">{short(tick)}</text>')
    for tick in y_ticks:
        out.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    middle = (TOP + BOTTOM) / 2
    out.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 42}" text-anchor="middle">throughput, IOPS (log scale)</text>')
    out.append(f'<text x="22" y="{middle}" text-anchor="middle" transform="rotate(-90 22 {middle})">'
               "mean latency, µs (log scale)</text>")  # fmt: skip
    for name, points in curves.items():
        at = [(depth, x(iops), y(us)) for depth, iops, us in points]
        line = " ".join(f"{px:.1f},{py:.1f}" for _, px, py in at)
        out.append(f'<polyline class="{name}" points="{line}" stroke-dasharray="{DASHES[name]}"/>')
        for depth, px, py in at:
            out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" class="{name}"/>')
            out.append(f'<text class="small halo {name}" x="{px - 7:.1f}" y="{py - 6:.1f}" text-anchor="end">{depth}</text>')
        # The name is below the first point, where the lines are farthest apart, and stays within the frame.
        _, px, py = at[0]
        side = "end" if px > (LEFT + RIGHT) / 2 else "start"
        out.append(f'<text class="name halo {name}" x="{px:.1f}" y="{py + 19:.1f}" text-anchor="{side}">{NAMES[name]}</text>')
    out.append(f'<text class="small faint" x="{LEFT}" y="{HEIGHT - 12}">{html.escape(caption)}</text>')
    return "\n".join(out) + "\n</svg>\n"
