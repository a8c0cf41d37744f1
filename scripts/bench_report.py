# SPDX-License-Identifier: MIT OR Apache-2.0
"""What scripts/bench prints of its results: one table of everything, and how far raio is from what it aims
at.

Results are lists of runs, by the names of workload and target. Every figure is the median of a list, every
aim a ratio of two such medians of the same, interleaved, runs.
"""

import statistics
import textwrap


def aim(what, measured, relation, bound, digits=3):
    """A row of a table of aims."""
    reached = measured >= bound if relation == "≥" else measured <= bound
    return f"| {what} | {measured:.{digits}f} | {relation} {bound:g} | {'yes' if reached else '**no**'} |"


def median(runs, key):
    values = [run[key] for run in runs]
    return None if None in values else statistics.median(values)


def table(results):
    yield (
        "| | | IOPS (min-max) | MiB/s | mean µs | p50 µs | p99 µs | p99.9 µs | CPU µs per I/O: client | server "
        "| × spinning floor | × nbdkit |"
    )
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    last = None
    for (workload, target), runs in results.items():

        def ratio(other):
            others = results.get((workload, other))
            return f"{median(runs, 'iops') / median(others, 'iops'):.2f}" if others else ""

        iops = [run["iops"] for run in runs]
        server_cpu = median(runs, "server_cpu_us")
        yield (
            f"| {workload if workload != last else ''} | {target} "
            f"| {median(runs, 'iops'):,.0f} ({min(iops):,.0f}-{max(iops):,.0f}) | {median(runs, 'mib_s'):,.0f} "
            f"| {median(runs, 'mean_us'):,.1f} | {median(runs, 'p50_us'):,.1f} | {median(runs, 'p99_us'):,.1f} "
            f"| {median(runs, 'p99_9_us'):,.1f} | {median(runs, 'client_cpu_us'):.2f} "
            f"| {'' if server_cpu is None else f'{server_cpu:.2f}'} | {ratio('floor, spinning')} | {ratio('nbdkit')} |"
        )
        last = workload


def rows(results):
    """For each workload its name, and by target the IOPS, the median and the 99th percentile of the latency in µs."""
    names = {"floor, spinning": "floor", "local": "local", "raio": "raio", "nbdkit": "nbdkit"}
    for workload in dict.fromkeys(workload for workload, _ in results):
        row = {}
        for target, name in names.items():
            if runs := results.get((workload, target)):
                row[name] = median(runs, "iops"), median(runs, "p50_us"), median(runs, "p99_us")
        if "raio" in row:
            yield workload, row


def short_table(results):
    """The table of the README."""
    yield "| IOPS | floor | local | raio | nbdkit | raio × floor | raio × nbdkit | raio: median µs | p99 µs |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for workload, row in rows(results):
        iops = [
            f"{row[name][0]:,.0f}" if name in row else "" for name in ("floor", "local", "raio", "nbdkit")
        ]
        ratios = [
            f"{row['raio'][0] / row[name][0]:.2f}" if name in row else "" for name in ("floor", "nbdkit")
        ]
        yield f"| {' | '.join([workload, *iops, *ratios])} | {row['raio'][1]:,.1f} | {row['raio'][2]:,.1f} |"


END = "<!-- end of what scripts/bench wrote -->"


def replace_block(page, lines, writer="scripts/bench"):
    """Puts lines between the two marks of a document."""
    mark = f"<!-- written by {writer} --publish -->"
    before, begin, rest = page.read_text().partition(mark)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the lines {mark!r} and {END!r}. Put them around its table.")
    page.write_text("\n".join([f"{before}{mark}", *lines, f"{END}{after}"]))


def pairs(results, new, old):
    """How one target does beside another that took turns with it: the ratios within each pair of runs."""
    yield f"| {new} / {old} | pairs | IOPS: median | min | max | p99: median | server's CPU per I/O: median |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for workload in dict.fromkeys(workload for workload, _ in results):
        both = list(zip(results[workload, new], results[workload, old]))

        def ratios(key):
            return [one[key] / other[key] for one, other in both]

        iops = ratios("iops")
        yield (
            f"| {workload} | {len(both)} | {statistics.median(iops):.3f} | {min(iops):.3f} | {max(iops):.3f} "
            f"| {statistics.median(ratios('p99_us')):.3f} | {statistics.median(ratios('server_cpu_us')):.3f} |"
        )


def aims(results, idle_cpu_percent):
    """A line for each aim of which this run has the measurements."""
    d1, d32, d128 = (f"4 KiB random read, depth {depth}" for depth in (1, 32, 128))
    k128, m1 = "128 KiB sequential read, depth 32", "1 MiB sequential read, depth 32"
    write, jobs = "4 KiB random write, depth 32", "4 KiB random read, depth 32, four jobs"
    direct1, direct32 = f"{d1}, O_DIRECT", f"{d32}, O_DIRECT"
    floor, blocking = "floor, spinning", "floor, blocking"

    def of(workload, target, key="iops"):
        return median(results[workload, target], key)

    # what, how to get it, and its least ("≥") or greatest ("≤") value
    lines = [
        ("depth 1: raio / spinning floor, IOPS", lambda: of(d1, "raio") / of(d1, floor), "≥", 0.8),
        ("depth 1: raio with no spin / blocking floor, IOPS",
         lambda: of(d1, "raio, no spin") / of(d1, blocking), "≥", 1),
        ("idle server, % of a processor", lambda: idle_cpu_percent, "≤", 0.1),
        ("depth 32: raio / spinning floor, IOPS", lambda: of(d32, "raio") / of(d32, floor), "≥", 0.8),
        ("depth 128 / depth 32: raio, IOPS", lambda: of(d128, "raio") / of(d32, "raio"), "≥", 1),
        ("128 KiB, depth 32: raio / spinning floor, IOPS", lambda: of(k128, "raio") / of(k128, floor), "≥", 1),
        ("1 MiB, depth 32: raio / spinning floor, IOPS", lambda: of(m1, "raio") / of(m1, floor), "≥", 1),
        ("random write, depth 32: raio / nbdkit, IOPS", lambda: of(write, "raio") / of(write, "nbdkit"), "≥", 2),
        ("O_DIRECT, depth 32: raio / local, IOPS", lambda: of(direct32, "raio") / of(direct32, "local"), "≥", 0.95),
        ("O_DIRECT, depth 1: (raio - local) / spinning floor, mean latency",
         lambda: (of(direct1, "raio", "mean_us") - of(direct1, "local", "mean_us")) / of(d1, floor, "mean_us"),
         "≤", 1.5),
        ("null, depth 32: raio / spinning floor, IOPS", lambda: of(d32, "raio, null") / of(d32, floor), "≥", 1),
        ("null, depth 32: four jobs / one, IOPS", lambda: of(jobs, "raio, null") / of(d32, "raio, null"), "≥", 1),
        ("null, depth 32, four jobs: p99 / mean latency",
         lambda: of(jobs, "raio, null", "p99_us") / of(jobs, "raio, null", "mean_us"), "≤", 3),
        ("depth 32, client's CPU per I/O: raio / spinning floor",
         lambda: of(d32, "raio", "client_cpu_us") / of(d32, floor, "client_cpu_us"), "≤", 1.25),
        ("depth 32, server's CPU per I/O: raio / spinning floor",
         lambda: of(d32, "raio", "server_cpu_us") / of(d32, floor, "server_cpu_us"), "≤", 1.25),
        ("depth 1: p99.9 / median latency of raio",
         lambda: of(d1, "raio", "p99_9_us") / of(d1, "raio", "p50_us"), "≤", 10),
    ]  # fmt: skip
    yield "| aim | measured | | reached |"
    yield "|---|--:|--:|---|"
    for what, value, relation, bound in lines:
        try:
            measured = value()
        except KeyError:  # --only left it out
            continue
        yield aim(what, measured, relation, bound)
    disturbed = [w for w in (d1, d32, d128) if (w, floor) in results and of(w, floor) < of(w, blocking)]
    if disturbed:
        yield ""
        yield textwrap.fill(
            f"These ratios mean little: the spinning floor was slower than the blocking one at {', '.join(disturbed)}, so "
            "something else used the processors. Measure again on a quiet machine, with two processors at least.",
            110,
        )
