# SPDX-License-Identifier: MIT OR Apache-2.0
"""Draws what scripts/bench measured, as SVGs that are readable in light and dark."""

import math

from picture import Picture

WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 74, 690, 64, 396
COLOURS = {"raio": "blue", "nbdkit": "orange", "local": "grey", "floor": "grey"}
NAMES = {
    "raio": "raio",
    "nbdkit": "nbdkit",
    "local": "local io_uring, no network",
    "floor": "floor: bare TCP and pread",
}
DASHES = {"raio": "", "nbdkit": "7 3", "local": "2 3"}
# Where the label of a point may be: beside it, towards the first free side, with its anchor.
SIDES = [(-7, -6, "end"), (7, -6, "start"), (8, 4, "start"), (-8, 4, "end"), (7, 14, "start"), (-7, 14, "end"),
         (0, -9, "middle"), (0, 18, "middle"), (16, -12, "start"), (-16, -12, "end"), (16, 18, "start"), (-16, 18, "end")]  # fmt: skip


def axis(values, below):
    """The bounds of a logarithmic axis and its ticks: 1, 2, 5 of each decade. The lower end is at most `below` of the least."""
    steps = [m * 10**e for e in range(-1, 9) for m in (1, 2, 5)]
    low = max(s for s in steps if s <= min(values) * below)
    high = min(s for s in steps if s >= max(values) * 1.05)
    return low, high, [s for s in steps if low <= s <= high]


def short(value):
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def rectangle(x, y, text, anchor, size=11):
    """What a text covers: left, top, right, bottom."""
    width = len(text) * size * 0.6
    left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
    return left, y - size, left + width, y + 2


def overlaps(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


class Labels:
    """Places labels so that they cover neither each other nor the points, and lines as little as possible."""

    def __init__(self, lines):
        self.points = [point for line in lines for point in line]
        self.along = []  # points every few pixels along the lines
        for line in lines:
            for (ax, ay), (bx, by) in zip(line, line[1:]):
                steps = max(1, int(math.dist((ax, ay), (bx, by)) / 3))
                self.along += [
                    (ax + (bx - ax) * i / steps, ay + (by - ay) * i / steps) for i in range(steps + 1)
                ]
        self.taken = []

    def place(self, x, y, text, sides=SIDES, size=11):
        """Where the label of a point is to be: x, y, anchor."""

        def cost(side):
            box = rectangle(x + side[0], y + side[1], text, side[2], size)
            near = (box[0] - 4, box[1] - 3, box[2] + 4, box[3] + 3)
            covered = sum(overlaps(box, taken) for taken in self.taken)
            points = sum(near[0] < px < near[2] and near[1] < py < near[3] for px, py in self.points)
            lines = sum(box[0] < px < box[2] and box[1] < py < box[3] for px, py in self.along)
            return 1000 * covered + 100 * points + lines

        side = min(sides, key=cost)
        self.taken.append(rectangle(x + side[0], y + side[1], text, side[2], size))
        return x + side[0], y + side[1], side[2]


def latency(curves, caption):
    """Latency against throughput. `curves`: for each target its points (depth, IOPS, mean latency in µs), by depth."""
    x_low, x_high, x_ticks = axis([iops for points in curves.values() for _, iops, _ in points], 0.95)
    y_low, y_high, y_ticks = axis([us for points in curves.values() for *_, us in points], 0.6)

    def x(iops):
        return LEFT + (RIGHT - LEFT) * math.log(iops / x_low) / math.log(x_high / x_low)

    def y(us):
        return BOTTOM - (BOTTOM - TOP) * math.log(us / y_low) / math.log(y_high / y_low)

    label = "Mean latency against throughput of 4 KiB random reads at depths 1 to 256"
    picture = Picture(WIDTH, HEIGHT, label, "polyline{stroke-width:2.5}")
    picture.text(LEFT, 26, "Latency against throughput: 4 KiB random reads, in the page cache", "title")
    picture.text(LEFT, 44, "Numbers at the points are queue depths. Right and down is better.", "small faint")
    for tick in x_ticks:
        picture.out.append(f'<path class="grid" d="M{x(tick):.1f} {TOP}V{BOTTOM}"/>')
        picture.text(round(x(tick), 1), BOTTOM + 20, short(tick), anchor="middle")
    for tick in y_ticks:
        picture.out.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{RIGHT}"/>')
        picture.text(LEFT - 8, round(y(tick) + 4, 1), short(tick), anchor="end")
    middle = (TOP + BOTTOM) / 2
    picture.text((LEFT + RIGHT) / 2, BOTTOM + 42, "throughput, IOPS (log scale)", anchor="middle")
    picture.out.append(f'<text x="22" y="{middle}" text-anchor="middle" transform="rotate(-90 22 {middle})">'
                       "mean latency, µs (log scale)</text>")  # fmt: skip
    lines = {name: [(x(iops), y(us)) for _, iops, us in points] for name, points in curves.items()}
    for name, line in lines.items():
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in line)
        picture.out.append(
            f'<polyline class="{COLOURS[name]}-line" points="{path}" stroke-dasharray="{DASHES[name]}"/>'
        )
    for name, line in lines.items():
        for px, py in line:
            picture.out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" class="{COLOURS[name]}"/>')
    labels = Labels(list(lines.values()))
    for name, line in lines.items():
        # The name is below the first point, where the lines are farthest apart, and stays within the frame.
        px, py = line[0]
        below = [(0, 19, "end" if px > (LEFT + RIGHT) / 2 else "start")]
        at = labels.place(px, py, NAMES[name], below, 13)
        picture.text(round(at[0], 1), round(at[1], 1), NAMES[name], f"strong halo {COLOURS[name]}", at[2])
    for name, line in lines.items():
        for (depth, *_), (px, py) in zip(curves[name], line):
            at = labels.place(px, py, str(depth))
            picture.text(round(at[0], 1), round(at[1], 1), str(depth), f"small halo {COLOURS[name]}", at[2])
    picture.text(LEFT, HEIGHT - 12, caption, "small faint")
    return picture.svg()


def throughput(rows, caption):
    """Bars. `rows`: for each workload its name and the IOPS by target; of floor and local the first that there is is drawn."""
    bar, gap, first = 15, 18, 78
    groups = [
        (name, [t for t in ("floor", "local") if t in iops][:1] + ["raio", "nbdkit"], iops)
        for name, iops in rows
    ]
    height = first + sum(len(targets) * bar + gap for _, targets, _ in groups) + 18
    left, right = 290, 672
    picture = Picture(WIDTH, height, "Bars: IOPS of raio beside the floor or local io_uring, and nbdkit")
    picture.text(20, 26, "Throughput: IOPS, the fastest of each group is full width", "title")
    x = 20
    for name in ("floor", "local", "raio", "nbdkit"):
        dashes = ' stroke-dasharray="2 3"' if name == "local" else ""
        fill = f"{COLOURS[name]}-box" if name in ("floor", "local") else COLOURS[name]
        picture.out.append(f'<rect x="{x}" y="42" width="12" height="12" class="{fill}"{dashes}/>')
        picture.text(x + 18, 52, NAMES[name], "small")
        x += 34 + len(NAMES[name]) * 6.4
    y = first
    for name, targets, iops in groups:
        most = max(iops[target] for target in targets)
        picture.text(left - 10, y + len(targets) * bar / 2 + 3, name, anchor="end")
        for target in targets:
            width = (right - left) * iops[target] / most
            fill = f"{COLOURS[target]}-box" if target in ("floor", "local") else COLOURS[target]
            dashes = ' stroke-dasharray="2 3"' if target == "local" else ""
            picture.out.append(
                f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{bar - 3}" class="{fill}"{dashes}/>'
            )
            picture.text(round(left + width + 6, 1), y + bar - 5, f"{iops[target]:,.0f}", "small")
            y += bar
        y += gap
    picture.text(20, height - 12, caption, "small faint")
    return picture.svg()
