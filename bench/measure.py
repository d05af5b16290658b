"""Measures what bench/run says; started by it, beside a Postgres whose commits are durable."""

import argparse
import itertools
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import parts
from fill import fill
from report import Report
from server import Server

HERE = Path(__file__).parent
# A run asks for a slice of the sessions, the next run for the next.
SESSIONS, SLICE = 20_000, 2_000


class Bench:
    """Databases, servers and load for the parts; what they find goes into the report."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.quick, self.binary, self.limit = options.quick, options.binary, options.limit
        self.report = Report(options)
        self.postgres = os.environ["ATLUS_TEST_POSTGRES_URL"].rsplit("/", 1)[0]
        self.names, self.filled = itertools.count(), {}

    def say(self, what):
        print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)

    def database(self, kind, *groups):
        """A database with groups of sessions, each how many and of how many turns, and for each group the file that lists
        them. What is asked for again is a copy, so that all begin alike."""
        if (kind, groups) not in self.filled:
            said = " and ".join(f"{sessions} sessions of {turns} turns" for sessions, turns in groups)
            self.say(f"filling {kind}: {said}")
            made, lists = self.create(kind), []
            for ids in fill(self.binary, made, *groups):
                lists.append(self.folder / f"sessions_{next(self.names)}")
                lists[-1].write_text("".join(f"{id}\n" for id in ids))
            self.filled[kind, groups] = made, lists
        made, lists = self.filled[kind, groups]
        return self.create(kind, made), lists

    def create(self, kind, template=None):
        name = f"bench_{next(self.names)}"
        if kind == "SQLite":
            if template:
                shutil.copy(template.removeprefix("sqlite://"), self.folder / name)
            return f"sqlite://{self.folder}/{name}"
        template = urlsplit(template).path[1:] if template else "template0"
        make = f"CREATE DATABASE {name} TEMPLATE {template}"
        subprocess.run(["psql", "-qX", f"{self.postgres}/postgres", "-c", make], check=True)
        # Whoever asks has its statements planned as the server has.
        options = "-c%20plan_cache_mode%3Dforce_generic_plan%20-c%20enable_seqscan%3Doff%20-c%20jit%3Doff"
        return f"{self.postgres}/{name}?sslmode=disable&options={options}"

    def server(self, stack, database, **settings):
        return stack.enter_context(Server(self.binary, database, **settings))

    def helper(self, stack, *arguments):
        """Starts a server of bench/limit; returns its address."""
        process = subprocess.Popen([self.limit, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
        stack.callback(lambda: (process.terminate(), process.wait()))
        return process.stdout.readline().strip()

    # Runs: functions of how many seconds and of a number, which tells whose turn it is to be asked.

    def wrk(self, url, kind, sessions, connections, count=SLICE, of=SESSIONS):
        script = ["-s", HERE / "load.lua", url, "--", kind, sessions]
        wrk = ["wrk", "-t1", f"-c{connections}", "--timeout", "30s"]
        return lambda seconds, number: self.told([*wrk, f"-d{seconds}s", *script, number * count % of, count])

    def driver(self, database, sessions, clients):
        run = [self.limit, "run", database, "--clients", clients, "--sessions", sessions, "--count", SLICE]
        return lambda seconds, number: self.told([*run, "--seconds", seconds, "--first", number * SLICE % SESSIONS])

    def pgbench(self, database, clients):
        script = self.folder / "chat.pgbench"
        script.write_text(self.output([self.limit, "pgbench"]))
        pgbench = ["pgbench", "-n", "-M", "prepared", "-c", clients, "-j", 2, "-P", 1, "-f", script]

        def run(seconds, number):
            first = number * SLICE % SESSIONS
            # Its connections are new; in the first seconds they plan their statements.
            command = [*pgbench, "-T", seconds + 3, "-D", f"first={first}", "-D", f"last={first + SLICE - 1}", database]
            rates = re.findall(r"progress: .* ([\d.]+) tps", self.output(command, stderr=subprocess.STDOUT))
            return {"rate": statistics.mean(map(float, rates[3:])), "errors": 0}

        return run

    def interleave(self, part, cases):
        """Runs the cases in turn, the order turned round in each round, and before each round looks at the disk."""
        seconds, order = self.options.seconds, list(enumerate(cases.items()))
        self.say(f"{part}, once to warm up")
        for place, (_, run) in order:
            run(1, place)
        rounds = []
        for round_ in range(self.options.rounds):
            self.say(f"{part}, round {round_ + 1} of {self.options.rounds}")
            rounds.append({"fdatasync": self.fdatasync()})
            for place, (name, run) in reversed(order) if round_ % 2 else order:
                result = run(seconds, (round_ + 1) * len(cases) + place)
                if result["errors"] > 0.01 * result["rate"] * seconds:
                    raise SystemExit(f"{part}, {name}: {result}")
                rounds[-1][name] = result
        self.report.rounds(part, rounds)
        self.report.write()
        return rounds

    def fdatasync(self):
        """What 200 times a page written over and waited for take, in milliseconds."""
        took = []
        with open(self.folder / "page", "wb") as file:
            for _ in range(201):
                os.pwrite(file.fileno(), os.urandom(4096), 0)
                began = time.perf_counter()
                os.fdatasync(file.fileno())
                took.append(1000 * (time.perf_counter() - began))
        # The first makes the file longer.
        took = sorted(took[1:])
        return {"p50": took[100], "p99": took[198]}

    def has_setting(self, name):
        return name in self.output([self.binary, "serve", "--help"])

    def output(self, command, stderr=None):
        return subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=stderr, text=True, check=True).stdout

    def told(self, command):
        """The JSON of a command's last line."""
        return json.loads(self.output(command).splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(prog="bench/run", description="Measures the server against the limit; see bench/run.")
    parser.add_argument("parts", nargs="*", choices=[[], *parts.ALL], help="which parts (all)")
    parser.add_argument("--quick", action="store_true", help="fewer connections, rounds and turns")
    parser.add_argument("--rounds", type=int, help="5, or 2 if quick")
    parser.add_argument("--seconds", type=int, help="of each run: 2, or 1 if quick")
    parser.add_argument("--minutes", type=float, help="of load before memory is looked at: 10, or 0.2 if quick")
    parser.add_argument("--binary", default="target/release/atlus")
    parser.add_argument("--limit", default="target/bench/build/release/limit", help=argparse.SUPPRESS)
    parser.add_argument("--results", default="bench/results", help="where the table and the plot are written")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (1 if options.quick else 2)
    options.minutes = options.minutes or (0.2 if options.quick else 10)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for name in options.parts or parts.ALL:
            parts.ALL[name](bench)
            bench.report.write()
    bench.report.tell()


if __name__ == "__main__":
    main()
