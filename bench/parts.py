"""What is measured. Each part runs its cases in turns and tells which ratios of them count."""

import os
import socket
import statistics
import time
from contextlib import ExitStack
from subprocess import DEVNULL, Popen

from server import Server

DATABASES = ["SQLite", "Postgres"]
MODELS = {"0 ms": 0, "20 ms": 20}
# The setting that says how many writes share a transaction at most.
WRITE_BATCH = "ATLUS_WRITE_BATCH"


def usual(bench, kind):
    """A database of which each run asks for other sessions."""
    database, (sessions,) = bench.database(kind, (20_000, 4))
    return database, sessions


def connections(bench):
    return [1, 64] if bench.quick else [1, 16, 64, 256]


def ratio(rounds, name, of, figure="rate"):
    return [round_[name][figure] / round_[of][figure] for round_ in rounds]


def chats(bench):
    """Chats, against the same work without a server, and one statement per write by pgbench."""
    for kind in DATABASES:
        with ExitStack() as stack:
            database, sessions = usual(bench, kind)
            server = bench.server(stack, database)
            bare, _ = usual(bench, kind)
            limit = bench.helper(stack, "serve", bare)
            cases = {}
            for n in connections(bench):
                cases[f"server, {n}"] = bench.wrk(server.url, "chat", sessions, n)
                cases[f"limit, {n}"] = bench.wrk(limit, "chat", sessions, n)
            own, _ = usual(bench, kind)
            for n in (1, 64):
                cases[f"database alone, {n}"] = bench.driver(own, sessions, n)
            if kind == "Postgres":
                cases["pgbench, 64"] = bench.pgbench(usual(bench, kind)[0], 64)
            rounds = bench.interleave(f"chats, {kind}", cases)
            figure = bench.report.figure
            for n in connections(bench):
                target = {64: 0.6, 256: 0.8}.get(n) if kind == "SQLite" else None
                figure(f"chats, {kind}, {n} connections, of the limit", ratio(rounds, f"server, {n}", f"limit, {n}"), ">=", target)
            if kind == "Postgres":
                figure("chats, Postgres, 64 connections, of pgbench", ratio(rounds, "server, 64", "pgbench, 64"), ">=", 1)
            added = [round_["server, 1"]["p50"] - round_["limit, 1"]["p50"] for round_ in rounds]
            figure(f"chat, {kind}, 1 connection, added to the limit's p50, ms", added, "<=", 0.5)
            waits = [round_["server, 64"]["p99"] / round_["fdatasync"]["p50"] for round_ in rounds]
            figure(f"chats, {kind}, 64 connections, p99 in fdatasyncs", waits, "<=", 12)


def models(bench):
    """Chats and streams with a scripted model server behind them."""
    for kind in DATABASES:
        with ExitStack() as stack:
            cases = {}
            for model, delay in MODELS.items():
                url = bench.helper(stack, "model", "--delay-ms", delay)
                database, sessions = usual(bench, kind)
                settings = {"ATLUS_MODEL_URL": f"{url}/v1", "ATLUS_MODEL": "scripted", "ATLUS_MODEL_CONCURRENCY": "256",
                            "ATLUS_MEMORY_EXTRACT": "off"}
                server = bench.server(stack, database, **settings)
                for n in connections(bench):
                    for what in ("chat", "stream"):
                        cases[f"{what}, model of {model}, {n}"] = bench.wrk(server.url, what, sessions, n)
            rounds = bench.interleave(f"models, {kind}", cases)
            for n in connections(bench):
                added = [round_[f"chat, model of 20 ms, {n}"]["p50"] - 20 for round_ in rounds]
                bench.report.figure(f"chat, {kind}, model of 20 ms, {n} connections, added to that, ms", added)


def requests(bench):
    """Creations, reads, pages and streams, against an empty handler."""
    count = 4000
    for kind in DATABASES:
        with ExitStack() as stack:
            database, (sessions,) = bench.database(kind, (count, 20))
            server, empty = bench.server(stack, database), bench.helper(stack, "empty")
            cases = {}
            for n in connections(bench):
                for what in ("session", "page", "create", "stream"):
                    cases[f"{what}, {n}"] = bench.wrk(server.url, what, sessions, n, of=count)
                cases[f"empty handler, {n}"] = bench.wrk(empty, "empty", sessions, n)
            rounds = bench.interleave(f"requests, {kind}", cases)
            for n in connections(bench):
                share, target = ratio(rounds, f"session, {n}", f"empty handler, {n}"), 0.4 if n == 64 else None
                bench.report.figure(f"session reads, {kind}, {n} connections, of an empty handler", share, ">=", target)


def growth(bench):
    """The same with few and with many turns: in the session, and in the database."""
    for kind in DATABASES:
        growth_of_a_session(bench, kind)
    for kind in DATABASES:
        growth_of_the_database(bench, kind)


def growth_of_a_session(bench, kind):
    among = {10: 2000, 1000: 50, 100_000: 1 if bench.quick else 4}
    whats = {"chat": 1.1, "context": None, "search": None, "session": None, "first page": 1.1, "last page": 1.1, "middle page": 1.1}
    with ExitStack() as stack:
        database, lists = bench.database(kind, *((count, turns) for turns, count in among.items()))
        # A context has room for half of a short session: as much is shown of either, and older turns are looked for in both.
        server, cases = bench.server(stack, database, ATLUS_CONTEXT_TOKENS="300"), {}
        for (turns, count), sessions in zip(among.items(), lists):
            cursors, count_ = sessions.with_suffix(".cursors"), min(count, 50)
            ids = sessions.read_text().split()[:count_]
            cursors.write_text("".join(f"{id} {middle(server, id, turns)}\n" for id in ids))
            for what in whats:
                n = 1 if what == "chat" else 16
                listed, of = (cursors, count_) if what == "middle page" else (sessions, count)
                cases[f"{what}, {n}, {turns}"] = bench.wrk(server.url, what, listed, n, of, of)
        rounds = bench.interleave(f"growth of a session, {kind}", cases)
        for what, target in whats.items():
            n = 1 if what == "chat" else 16
            for few, goal in (10, target), (1000, None):
                longer = ratio(rounds, f"{what}, {n}, 100000", f"{what}, {n}, {few}", "p50")
                bench.report.figure(f"{what}, {kind}, session of 100,000 turns, times that of {few:,}", longer, "<=", goal)


def growth_of_the_database(bench, kind):
    few, many = 1000, 20_000 if bench.quick else 200_000
    whats = [("chat", 1), ("chat", 64), ("session", 64), ("first page", 64), ("create", 64)]
    with ExitStack() as stack:
        cases = {}
        for count in (few, many):
            database, (sessions,) = bench.database(kind, (count, 10))
            server = bench.server(stack, database)
            for what, n in whats:
                cases[f"{what}, {n}, {10 * count}"] = bench.wrk(server.url, what, sessions, n, few, count)
            # In the same database, where the other does nothing meanwhile.
            limit = bench.helper(stack, "serve", database)
            for n in (1, 64):
                cases[f"limit, {n}, {10 * count}"] = bench.wrk(limit, "chat", sessions, n, few, count)
        rounds = bench.interleave(f"growth of the database, {kind}", cases)
        for what, n in [*whats, ("limit", 1), ("limit", 64)]:
            slower = ratio(rounds, f"{what}, {n}, {10 * few}", f"{what}, {n}, {10 * many}")
            name = f"{what}, {kind}, {n} connections, database of {10 * many:,} turns, times that of {10 * few:,}"
            bench.report.figure(name, slower, "<=", None if what == "limit" else 1.2)


def middle(server, session, turns):
    """The cursor of a page in the middle of a session, which is had by reading up to there."""
    cursor = ""
    for _ in range(max(1, turns // 200)):
        page = server.call("GET", f"/sessions/{session}/turns?limit={min(100, turns // 2)}{cursor}")
        cursor = f"&cursor={page['next_cursor']}"
    return page["next_cursor"]


def memory(bench):
    """Memory idle, under load and per open stream; the time a start takes; the binary's size."""
    figure = bench.report.figure
    figure("size of the binary, MiB", [os.path.getsize(bench.binary) / (1 << 20)])
    database, sessions = usual(bench, "SQLite")
    starts = []
    for _ in range(20 if bench.quick else 100):
        began = time.perf_counter()
        with Server(bench.binary, database) as server:
            server.call("GET", "/health")
            starts.append(1000 * (time.perf_counter() - began))
    figure("start to the first healthy answer, SQLite, ms", starts, "<=", 50)
    with ExitStack() as stack:
        server = bench.server(stack, database)
        server.call("GET", "/health")
        time.sleep(2)
        figure("resident memory idle, SQLite, MiB", [server.memory() / 1024], "<=", 20)
        figure("of that not the binary's own pages (RssAnon), MiB", [server.memory("RssAnon") / 1024])
        figure("proportional share (PSS) idle, MiB", [server.memory("Pss", "smaps_rollup") / 1024])
        bench.say(f"load for {bench.options.minutes:g} minutes")
        command = ["wrk", "-t1", "-c64", f"-d{60 * bench.options.minutes:.0f}s", "-s", "bench/load.lua", server.url, "--", "chat",
                   sessions, "0", "20000"]
        load, series, began = Popen(list(map(str, command)), stdout=DEVNULL), [], time.monotonic()
        while load.poll() is None:
            series.append((time.monotonic() - began, server.memory() / 1024))
            time.sleep(1)
        bench.report.series("memory", ["seconds", "MiB"], series)
        figure(f"resident memory after {bench.options.minutes:g} minutes at 64 connections, SQLite, MiB", [series[-1][1]], "<=", 60)
    streams(bench)


def streams(bench, count=1000):
    with ExitStack() as stack:
        database, sessions = usual(bench, "SQLite")
        url = bench.helper(stack, "model", "--gap-ms", 1500)
        settings = {"ATLUS_MODEL_URL": f"{url}/v1", "ATLUS_MODEL": "scripted", "ATLUS_MODEL_CONCURRENCY": str(2 * count),
                    "ATLUS_MEMORY_EXTRACT": "off"}
        server = bench.server(stack, database, **settings)
        ids = sessions.read_text().split()
        # The first load what is kept.
        open_streams(stack, server, ids[count:count + 50])
        before, buffers = server.memory(), socket_buffers()
        open_streams(stack, server, ids[:count])
        time.sleep(1)
        bench.report.figure(f"{count} open streams, KiB of resident memory each", [(server.memory() - before) / count], "<=", 32)
        bench.report.figure("their socket buffers in the kernel, on all ends, KiB each", [(socket_buffers() - buffers) / count])


def open_streams(stack, server, ids):
    """Opens streams and waits until each has begun to be answered."""
    streams = []
    for id in ids:
        stream = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        body = f'{{"session_id":"{id}","message":"Tell me something."}}'
        stream.sendall(f"POST /api/v1/chat/stream HTTP/1.1\r\nHost: {server.address}\r\nContent-Type: application/json\r\n"
                       f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        streams.append(stream)
    for stream in streams:
        heard = b""
        while b"event: delta" not in heard:
            more = stream.recv(65536)
            assert more, heard
            heard += more


def socket_buffers():
    """Of all TCP sockets, in KiB."""
    with open("/proc/net/sockstat") as lines:
        tcp = next(line for line in lines if line.startswith("TCP:")).split()
    return int(tcp[tcp.index("mem") + 1]) * os.sysconf("SC_PAGE_SIZE") / 1024


def overload(bench):
    """Chats at rates that do not follow the answers, to four times what the server can do."""
    with ExitStack() as stack:
        database, sessions = usual(bench, "SQLite")
        server = bench.server(stack, database)
        closed = bench.wrk(server.url, "chat", sessions, 256)
        knee = statistics.median(closed(bench.options.seconds, number)["rate"] for number in range(3))
        rounds = {times: [] for times in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)}
        for number in range(bench.options.rounds):
            # Up and down in turn, since the database grows meanwhile.
            for times in list(rounds)[:: -1 if number % 2 else 1]:
                bench.say(f"overload: {times} times {knee:.0f} chats a second")
                load = [bench.limit, "load", server.address, "--rate", knee * times, "--sessions", sessions,
                        "--count", 20_000, "--seconds", 2 * bench.options.seconds]
                before = os.times()
                step = bench.told(load)
                after = os.times()
                # What the load generator leaves of the machine.
                spent = sum(after[2:4]) - sum(before[2:4])
                left = os.cpu_count() - spent / (after.elapsed - before.elapsed)
                rounds[times].append({"times the knee": times, **step, "CPUs left": left, "MiB": server.memory() / 1024})
        steps = [{name: statistics.median(step[name] for step in tried) for name in tried[0]} for tried in rounds.values()]
        bench.report.steps("overload", steps)
        best = max(step["good"] for step in steps)
        last, shed = steps[-1], sum(step["shed"] for step in steps)
        bench.report.figure("good chats at 4 times the knee, of the best", [last["good"] / best], ">=", 0.9)
        best = max(step["good"] / step["CPUs left"] for step in steps if step["times the knee"] >= 1)
        bench.report.figure("the same for each CPU second that the load generator leaves", [last["good"] / last["CPUs left"] / best], ">=", 0.9)
        bench.report.figure("p99 of good chats at 4 times the knee, ms", [last["p99"]])
        bench.report.figure("share refused with 503 at 4 times the knee", [last["shed"] / last["offered"]])
        if shed:
            without = sum(step["shed_without_retry_after"] for step in steps)
            bench.report.figure("of these without Retry-After", [without / shed], "<=", 0)


def batches(bench):
    """Many writes to a transaction, against one, by the same binary."""
    if not bench.has_setting(WRITE_BATCH):
        bench.say(f"batches: left out, for this binary has no {WRITE_BATCH}")
        return
    for kind in DATABASES:
        with ExitStack() as stack:
            cases = {}
            for most in (256, 1):
                database, sessions = usual(bench, kind)
                server = bench.server(stack, database, **{WRITE_BATCH: str(most)})
                cases[f"chat, at most {most} writes to a transaction, 64"] = bench.wrk(server.url, "chat", sessions, 64)
            rounds = bench.interleave(f"batches, {kind}", cases)
            bench.report.figure(f"group commit, {kind}, 64 connections, times one transaction per write", ratio(rounds, *cases),
                                ">=", 6 if kind == "SQLite" else None)


ALL = {part.__name__: part for part in (chats, models, requests, growth, memory, overload, batches)}
