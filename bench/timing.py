#!/usr/bin/env python3
"""Tells whether time tells: asks for ids of nothing and for ids of somebody else's sessions, in turns and at random, and
compares how long the answers take.

    bench/timing.py [--binary target/release/atlus] [--samples 1000] [--turns 500]
                    [--postgres postgres://USER@HOST/EMPTY_DATABASE] [--row-security] [WORD …]

Operations are measured whose names hold one of the words, or all. Two strangers ask: a key of another tenant, and one of
the same tenant that is bound to another user. For each operation are printed the median of either answer, the difference
of medians, how often an id of somebody's takes longer than one of nothing (0.5 is chance) and the probability of a
difference as large by chance alone (Mann-Whitney U, two-sided). Of twenty comparisons one is below 0.05 by chance; those
are marked that are too rare even for the best of twenty.
"""
import argparse, bisect, http.client, json, math, random, statistics, subprocess, tempfile, time

from server import JSON, Server

SESSIONS = 20
OPERATIONS = {
    "GET session": ("GET", "/sessions/{id}", None),
    "GET turns": ("GET", "/sessions/{id}/turns", None),
    "GET turns, newest": ("GET", "/sessions/{id}/turns?direction=desc&limit=1", None),
    "GET context": ("GET", "/sessions/{id}/context?message=hello", None),
    "GET search": ("GET", "/search?q=noted&session_id={id}", None),
    "PATCH session": ("PATCH", "/sessions/{id}", {"title": "taken"}),
    "DELETE session": ("DELETE", "/sessions/{id}", None),
    "DELETE turn": ("DELETE", "/sessions/{id}/turns/1", None),
    "POST chat": ("POST", "/chat", {"session_id": "{id}", "message": "hello"}),
    "POST turns": ("POST", "/sessions/{id}/turns", {"turns": [{"message": "m", "response": "r"}]}),
}


class Guarded(Server):
    def __init__(self, binary, database, row_security):
        super().__init__(binary, database, ATLUS_AUTH="required", ATLUS_ROW_SECURITY="on" if row_security else "off")

    def client(self, *args):
        made = subprocess.run([self.binary, "keys", "create", "--name", "bench", "--format", "json", *args],
                              env=self.env, check=True, capture_output=True)
        return Client(self.address, json.loads(made.stdout)["secret"])


class Client:
    def __init__(self, address, secret):
        self.connection = http.client.HTTPConnection(address, timeout=60)
        self.headers = {"Authorization": "Bearer " + secret}

    def ask(self, method, path, body=None):
        """Status, body and seconds of an answer."""
        text = None if body is None else json.dumps(body)
        began = time.perf_counter()
        self.connection.request(method, "/api/v1" + path, text, {**self.headers, **(JSON if body else {})})
        answer = self.connection.getresponse()
        data = answer.read()
        return answer.status, data, time.perf_counter() - began


def fill(value, id):
    return json.loads(json.dumps(value).replace("{id}", id))


def mann_whitney(first, second):
    """How often a value of `second` is the larger one, and the probability of that or more by chance."""
    both = sorted(first + second)
    def rank(value):
        return (bisect.bisect_left(both, value) + bisect.bisect_right(both, value) + 1) / 2
    n, m = len(first), len(second)
    u = sum(rank(value) for value in second) - m * (m + 1) / 2
    z = (u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
    return u / (n * m), math.erfc(abs(z) / math.sqrt(2))


def measure(client, operation, unknown, taken, samples):
    method, path, body = operation
    times = {False: [], True: []}
    seen = {False: set(), True: set()}
    # The first answers load what is kept.
    rounds = [pair for _ in range(samples + 20) for pair in random.sample([False, True], 2)]
    for i, somebodys in enumerate(rounds):
        id = random.choice(taken if somebodys else unknown)
        status, data, seconds = client.ask(method, fill(path, id), fill(body, id))
        seen[somebodys].add((status, len(data)))
        if i >= 40:
            times[somebodys].append(seconds)
    assert seen[False] == seen[True] and len(seen[True]) == 1, seen
    return times[False], times[True], seen[True].pop()[0]


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--binary", default="target/release/atlus")
    options.add_argument("--samples", type=int, default=1000)
    options.add_argument("--turns", type=int, default=500)
    options.add_argument("--postgres")
    options.add_argument("--row-security", action="store_true")
    options.add_argument("words", nargs="*", metavar="WORD")
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Guarded(options.binary, options.postgres or f"sqlite://{folder}/atlus.db", options.row_security)
        try:
            victim = server.client("--tenant", "acme", "--user", "victim")
            taken = []
            for _ in range(SESSIONS):
                made = json.loads(victim.ask("POST", "/sessions", {"title": "mine"})[1])["data"]["session_id"]
                for first in range(0, options.turns, 100):
                    turns = [{"message": f"message {i}", "response": "noted"} for i in range(first, first + 100)]
                    assert victim.ask("POST", f"/sessions/{made}/turns", {"turns": turns})[0] == 201
                taken.append(made)
            unknown = [f"session_{random.getrandbits(64):016x}" for _ in range(SESSIONS)]
            strangers = {"another tenant": server.client("--tenant", "globex"),
                         "another user": server.client("--tenant", "acme", "--user", "stranger")}
            print(f"{options.samples} samples of each, {SESSIONS} sessions of {options.turns} turns")
            print(f"{'':16}{'':20}{'nothing':>10}{'another’s':>11}{'difference':>12}{'longer':>8}{'p':>8}")
            for who, stranger in strangers.items():
                for name, operation in OPERATIONS.items():
                    if options.words and not any(word in name for word in options.words):
                        continue
                    nothing, anothers, status = measure(stranger, operation, unknown, taken, options.samples)
                    assert status == (200 if name == "GET search" else 404), status
                    medians = [statistics.median(times) * 1e6 for times in (nothing, anothers)]
                    longer, p = mann_whitney(nothing, anothers)
                    print(f"{who:16}{name:20}{medians[0]:8.0f} µs{medians[1]:8.0f} µs{medians[1] - medians[0]:+9.1f} µs"
                          f"{longer:8.3f}{p:8.3f}{'  <--' if p < 0.05 / 20 else ''}", flush=True)
        finally:
            server.stop()


main()
