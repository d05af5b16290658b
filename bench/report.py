"""The table and the plot of what was measured."""

import json
import operator
import os
import platform
import statistics
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REACHED = {">=": operator.ge, "<=": operator.le}
SAID = {">=": "≥", "<=": "≤"}


def quartiles(values):
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def spread(values):
    """Median and quartiles, as text."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    low, median, high = quartiles(values)
    digits = 0 if abs(median) >= 100 else 1 if abs(median) >= 10 else 2
    return f"{median:.{digits}f}" + (f" ({low:.{digits}f}–{high:.{digits}f})" if len(values) > 1 else "")


class Report:
    def __init__(self, options):
        self.folder = Path(options.results)
        self.data = {"when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "machine": machine(),
                     "how": f"{options.rounds} rounds of {options.seconds} s each" + (", quick" if options.quick else ""),
                     "figures": [], "rounds": {}, "series": {}, "steps": {}}

    def figure(self, name, values, sign=None, target=None):
        """What counts: one value per round, and the target where there is one."""
        self.data["figures"].append({"name": name, "values": values, "sign": sign if target is not None else None, "target": target})
        print(f"    {name}: {spread(values)}", flush=True)

    def rounds(self, part, rounds):
        self.data["rounds"][part] = rounds

    def series(self, name, columns, rows):
        self.data["series"][name] = {"columns": columns, "rows": rows}

    def steps(self, name, steps):
        self.data["steps"][name] = steps

    def write(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "results.json").write_text(json.dumps(self.data, indent=1) + "\n")
        (self.folder / "results.md").write_text(self.table())
        self.plot()

    def tell(self):
        reached = [is_reached(figure) for figure in self.data["figures"] if figure["target"] is not None]
        print(self.targets())
        print(f"written: {self.folder}/results.md, results.json and results.svg")
        print(f"{sum(reached)} targets reached, {len(reached) - sum(reached)} not")

    def targets(self):
        lines = ["| figure | median (quartiles) | target | reached |", "| --- | --- | --- | --- |"]
        for figure in self.data["figures"]:
            goal = reached = ""
            if figure["target"] is not None:
                goal, reached = f"{SAID[figure['sign']]} {figure['target']}", "yes" if is_reached(figure) else "no"
            lines.append(f"| {figure['name']} | {spread(figure['values'])} | {goal} | {reached} |")
        return "\n".join(lines)

    def table(self):
        text = [f"{self.data['when']}, {self.data['machine']}, {self.data['how']}.", self.targets()]
        for part, rounds in self.data["rounds"].items():
            disk = spread([round_["fdatasync"]["p50"] for round_ in rounds])
            slow = spread([round_["fdatasync"]["p99"] for round_ in rounds])
            text.append(f"## {part}\n\nAn fdatasync took {disk} ms, p99 {slow} ms.")
            lines = ["| case, connections | a second | p50, ms | p99, ms |", "| --- | --- | --- | --- |"]
            for case in rounds[0]:
                if case != "fdatasync":
                    cells = [spread([round_[case].get(figure) for round_ in rounds]) for figure in ("rate", "p50", "p99")]
                    lines.append(f"| {case} | {' | '.join(cells)} |")
            text.append("\n".join(lines))
        for name, steps in self.data["steps"].items():
            lines = [f"| {' | '.join(steps[0])} |", "| --- " * len(steps[0]) + "|"]
            lines += [f"| {' | '.join(spread([value]) for value in step.values())} |" for step in steps]
            text.append(f"## {name}\n\n" + "\n".join(lines))
        return "\n\n".join(text) + "\n"

    def plot(self):
        drawn = [(name, draw) for name, draw in PLOTS.items() if name in self.data["rounds"] or name in self.data["series"]
                 or name in self.data["steps"]]
        if not drawn:
            return
        figure, axes = plt.subplots(1, len(drawn), figsize=(5 * len(drawn), 4), squeeze=False, layout="constrained")
        for axis, (name, draw) in zip(axes[0], drawn):
            axis.set_title(name)
            draw(axis, self.data, name)
        figure.savefig(self.folder / "results.svg", metadata={"Date": None})
        plt.close(figure)


def is_reached(figure):
    return REACHED[figure["sign"]](quartiles(figure["values"])[1], figure["target"])


def machine():
    with open("/proc/cpuinfo") as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores of {model}, Linux {platform.release()}"


def draw_chats(axis, data, name):
    for who in ("limit", "server"):
        cases = [case for case in data["rounds"][name][0] if case.startswith(who + ",")]
        rates = [quartiles([round_[case]["rate"] for round_ in data["rounds"][name]]) for case in cases]
        low, median, high = zip(*rates)
        at = [int(case.rsplit(" ", 1)[1]) for case in cases]
        axis.plot(at, median, marker="o", label=who)
        axis.fill_between(at, low, high, alpha=0.2)
    axis.set(xscale="log", xlabel="connections", ylabel="chats a second", ylim=(0, None))
    axis.legend()


def draw_growth(axis, data, name):
    for what in dict.fromkeys(case.rsplit(", ", 1)[0] for case in data["rounds"][name][0] if case != "fdatasync"):
        cases = [case for case in data["rounds"][name][0] if case.rsplit(", ", 1)[0] == what]
        medians = [statistics.median(round_[case]["p50"] for round_ in data["rounds"][name]) for case in cases]
        axis.plot([int(case.rsplit(", ", 1)[1]) for case in cases], medians, marker="o", label=what)
    axis.set(xscale="log", yscale="log", xlabel="turns", ylabel="p50, ms")
    axis.legend(fontsize="small")


def draw_memory(axis, data, name):
    axis.plot(*zip(*data["series"][name]["rows"]))
    axis.set(xlabel="seconds at 64 connections", ylabel="resident, MiB", ylim=(0, None))


def draw_overload(axis, data, name):
    steps = data["steps"][name]
    offered = [step["offered"] for step in steps]
    axis.plot(offered, [step["good"] for step in steps], marker="o", label="good")
    axis.plot(offered, [step["shed"] for step in steps], marker="o", label="503")
    axis.set(xlabel="chats offered a second", ylabel="a second", ylim=(0, None))
    other = axis.twinx()
    other.plot(offered, [step["p99"] for step in steps], color="gray", linestyle="--", label="p99 of good, ms")
    other.plot(offered, [step["MiB"] for step in steps], color="gray", linestyle=":", label="resident, MiB")
    other.set_ylim(0, None)
    axis.legend(loc="upper left")
    other.legend(loc="lower right")


PLOTS = {"chats, SQLite": draw_chats, "chats, Postgres": draw_chats, "growth of a session, SQLite": draw_growth,
         "growth of a session, Postgres": draw_growth, "overload": draw_overload, "memory": draw_memory}
