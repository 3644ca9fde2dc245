#!/usr/bin/env python3
"""Writes docs/benchmarks.md and its plots from what `make bench` has measured.

    scripts/bench_report.py --from DIR --to DIR

DIR holds runtime.json, agent.json, pool.json and images.json, each as its script writes it; a part that was not measured is left out
and said so. Nothing is measured here, and no number is written that is not in these files.
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen before)

# The same file from the same numbers.
plt.rcParams.update({"svg.hashsalt": "runx", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "figure.constrained_layout.use": True, "svg.fonttype": "none"})
COLOURS = {"runx": "#1f6f4a", "runc": "#8c96a3", "crun": "#c9a227", "podman": "#8c96a3"}
OTHERS = ["#1f6f4a", "#8c96a3", "#c9a227", "#3a6ea5", "#a5493a", "#6b4a8c", "#4a4a4a"]
OPERATIONS = ["run", "create", "start", "exec", "state", "delete"]
MODES = {"back to back": "back to back", "gaps": "with a pause before each"}
BUNDLES = {"bare": "a bare bundle", "kubernetes": "a bundle as for a pod: seccomp, masked paths, limits",
           "mounts": "a bare bundle, with 1,000 more mounts on the host"}


class Report:
    """The page, and the directory of its plots."""

    def __init__(self, directory):
        self.directory = directory
        self.plots = directory / "benchmarks"
        self.lines = []

    def say(self, *lines):
        self.lines += lines

    def section(self, title, *lines):
        self.say("", f"## {title}", "", *lines, "")

    def table(self, header, rows, sides="right"):
        side = "--:" if sides == "right" else "---"
        self.say("", "| " + " | ".join(header) + " |", "|" + "|".join(["---"] + [side] * (len(header) - 1)) + "|")
        self.say(*("| " + " | ".join(row) + " |" for row in rows), "")

    def bars(self, name, title, groups, series, unit):
        """Bars side by side: `series` has a list of numbers, one for each of `groups`, under each name. None is left out."""
        figure, axes = plt.subplots(figsize=(7.2, 0.7 + 0.24 * len(groups) * (len(series) + 0.7)))
        height = 0.8 / len(series)
        for at, (label, values) in enumerate(series.items()):
            colour = COLOURS.get(label, OTHERS[at % len(OTHERS)])
            places = [group + height * at - 0.4 + height / 2 for group in range(len(groups))]
            known = [(place, value) for place, value in zip(places, values) if value is not None]
            drawn = axes.barh([place for place, _ in known], [value for _, value in known], height * 0.9, label=label, color=colour)
            axes.bar_label(drawn, labels=[number(value) for _, value in known], padding=3, fontsize=7)
        axes.set_yticks(range(len(groups)), groups)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(f"{unit}, less is better")
        axes.set_title(title, loc="left", fontsize=10)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8, loc="lower right")
        self.keep(figure, name, title)

    def keep(self, figure, name, title):
        self.plots.mkdir(exist_ok=True)
        figure.savefig(self.plots / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
        self.say(f"![{title}](benchmarks/{name}.svg)", "")


def number(value):
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def machine(report, facts):
    versions = ", ".join(version or f"no {name}" for name, version in facts["versions"].items())
    report.section("The machine", f"- {versions}",
                   f"- Linux {facts['kernel'].split('-')[0]} {facts['machine']}, {facts['processors']} processors, load {facts['load']:.2f} at the beginning",
                   f"- {facts['mounts']} mounts; cgroups: {facts['cgroups']}; snapshotter {facts['snapshotter'] or 'overlayfs'}",
                   f"- {facts['runs']} runs of each, in turn, so that a busy machine is busy for all; medians, minima in brackets")


def compared(report, results, suite, bundle, mode, operations, title, name):
    """One suite and bundle as a plot and a table."""
    rows = [row for row in results if (row["suite"], row["bundle"], row["mode"]) == (suite, bundle, mode)]
    operations = [operation for operation in operations if any(row["operation"] == operation for row in rows)]
    if not operations:
        return
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    found = {(row["operation"], row["runtime"]): row for row in rows}
    medians = {runtime: [found.get((operation, runtime), {}).get("median_ms") for operation in operations] for runtime in runtimes}
    report.bars(name, title, operations, medians, "milliseconds")

    def cell(operation, runtime):
        row = found.get((operation, runtime))
        if row is None:
            return "–"
        ratio = f", × {row['median_to_runx']:.2f}" if runtime != "runx" and "median_to_runx" in row else ""
        return f"{number(row['median_ms'])} ({number(row['min_ms'])}){ratio}"

    report.table([f"ms, {MODES[mode]}", *runtimes],
                 [[operation, *(cell(operation, runtime) for runtime in runtimes)] for operation in operations])


def runtime(report, data):
    machine(report, data["facts"])
    for skipped in data["skipped"]:
        report.say(f"- left out: {skipped['runtime']}, {skipped['suite']}: {skipped['reason']}")
    results = data["results"]
    report.section("The command beside runc and crun", "One program start an operation, as an engine calls an OCI runtime. "
                   "× tells how many times as long as runx it took in the same run.")
    for bundle in ("bare", "kubernetes"):
        for mode in MODES:
            compared(report, results, "command", bundle, mode, OPERATIONS, f"{BUNDLES[bundle]}, {MODES[mode]}",
                     f"command-{bundle}-{mode.split()[0]}")
    report.section("Under containerd", "`ctr run --rm`, the client's own time included.")
    for bundle in BUNDLES:
        compared(report, results, "containerd", bundle, "back to back", ["ctr run --rm", "ctr version"], BUNDLES[bundle],
                 f"containerd-{bundle}")
    for suite, title in (("shim", "The shim, request by request"), ("pods", "A pod, through CRI")):
        bundles = list(dict.fromkeys(row["bundle"] for row in results if row["suite"] == suite))
        if bundles:
            report.section(title)
        for bundle in bundles:
            steps = list(dict.fromkeys(row["operation"] for row in results if (row["suite"], row["bundle"]) == (suite, bundle)))
            compared(report, results, suite, bundle, "back to back", steps, f"{title.lower()}, {BUNDLES.get(bundle, bundle)}",
                     f"{suite}-{''.join(c if c.isalnum() else '-' for c in bundle)}")
    memory(report, data)
    if data["wasm"]:
        modules(report, data["wasm"])


def memory(report, data):
    if not (data["peak_kib"] or data["idle"]):
        return
    report.section("Memory")
    if data["peak_kib"]:
        runtimes = list(dict.fromkeys(row["runtime"] for row in data["peak_kib"]))
        groups = list(dict.fromkeys((row["operation"], row["bundle"]) for row in data["peak_kib"]))
        found = {(row["operation"], row["bundle"], row["runtime"]): row["kib"] / 1024 for row in data["peak_kib"]}
        values = {runtime: [found.get((*group, runtime)) for group in groups] for runtime in runtimes}
        report.bars("memory-commands", "the largest process that a command makes", [f"{o}, {b}" for o, b in groups], values, "MiB")
    if data["idle"]:
        runtimes = list(dict.fromkeys(row["runtime"] for row in data["idle"]))
        groups = list(dict.fromkeys(row["bundle"] for row in data["idle"]))
        found = {(row["bundle"], row["runtime"]): row["kib"] / 1024 / row["shims"] for row in data["idle"]}
        values = {runtime: [found.get((group, runtime)) for group in groups] for runtime in runtimes}
        report.bars("memory-shims", "an idle shim, its spawner included: proportional set size", groups, values, "MiB for each shim")


def modules(report, rows):
    report.section("WebAssembly")
    starts = [row for row in rows if "median_ms" in row]
    if starts:
        report.bars("wasm", "until it has run", [f"{row['what']}: {row['case']}" for row in starts],
                    {"runx": [row["median_ms"] for row in starts]}, "milliseconds")
    report.table(["measured", "case", "result"], [[row["what"], row["case"], numbers(row, ("what", "case"))] for row in rows], "left")


def numbers(row, without=()):
    return ", ".join(f"{name.replace('_', ' ')} {number(value) if isinstance(value, (int, float)) else value}"
                     for name, value in row.items() if name not in without)


def agent(report, data):
    report.section("The agent", "Requests of the unmodified SDKs, and of plain HTTP clients, against one agent on this machine. "
                   "The floor is the same program started without it; `ratio` is to the stub that answers at once.")
    timed = [(f"{suite}: {name}", row["median_ms"]) for suite, rows in data.items() for name, row in rows.items()
             if "median_ms" in row and "MiB" not in name]
    if timed:
        report.bars("agent", "median of a request", [name for name, _ in timed], {"runx": [value for _, value in timed]}, "milliseconds")
    report.table(["measured", "case", "result"],
                 [[suite, name, numbers(row)] for suite, rows in data.items() for name, row in rows.items()], "left")


def pool(report, data):
    report.section("The pool", "A program in a warm sandbox, beside a plain fork and exec (the floor) and beside sandboxes that are "
                   "made for one program by others.")
    for at, (case, rows) in enumerate(data["milliseconds"].items()):
        timed = {name: row for name, row in rows.items() if "p50" in row}
        report.bars(f"pool-{at + 1}", case, list(timed),
                    {"median": [row["p50"] for row in timed.values()], "99th percentile": [row["p99"] for row in timed.values()]},
                    "milliseconds")
        report.table([case, "min ms", "p50 ms", "p90 ms", "p99 ms", "× floor", "per second"],
                     [[name, *(number(row.get(key)) for key in ("min", "p50", "p90", "p99")),
                       number(row["p50"] / row["floor"]) if row.get("floor") else "–", number(row.get("per_second"))]
                      for name, row in rows.items()])
    kib = data["kib_of_memory"]
    report.bars("pool-memory", "memory for each sandbox", list(kib), {"memory": list(kib.values())}, "KiB")


def images(report, data):
    report.section("Images, beside podman", data.get("about", ""))
    for at, (case, rows) in enumerate(data["milliseconds"].items()):
        report.bars(f"images-{at + 1}", case, list(rows), {"median": [row["median"] for row in rows.values()]}, "milliseconds")
        ours = rows.get("runx", {}).get("median")
        report.table([case, "min ms", "median ms", "max ms", "to runx"],
                     [[name, *(number(row[key]) for key in ("min", "median", "max")), f"× {row['median'] / ours:.2f}" if ours else "–"]
                      for name, row in rows.items()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=pathlib.Path, required=True)
    parser.add_argument("--to", type=pathlib.Path, required=True)
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    report = Report(options.to)
    report.say("# Benchmarks", "", "Written by `make bench`, which measures everything in one run, runx and its peers in turn, on one machine. "
               "Absolute times are this machine's; what to compare are the ratios. Run it on yours: it replaces this page.")
    for name, write in (("runtime", runtime), ("images", images), ("agent", agent), ("pool", pool)):
        path = options.source / f"{name}.json"
        if path.exists():
            write(report, json.loads(path.read_text()))
        else:
            report.section(f"Not measured: {name}", "Its part of `make bench` did not run.")
    page = options.to / "benchmarks.md"
    text = "\n".join(report.lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    page.write_text(text.rstrip() + "\n")
    print(f"written: {page}")


if __name__ == "__main__":
    main()
