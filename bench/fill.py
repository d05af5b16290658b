"""Fills a database with sessions, fast: a session that the server made is repeated by SQL, search entries included."""

import hashlib
import json
import sqlite3
import subprocess

from server import Server, text

TEMPLATE = 100


def session_id(n):
    """What pgbench's hash_fnv1a(n, 0) gives, so that it can ask for the sessions, too."""
    bits = 0xCBF29CE484222325
    for byte in n.to_bytes(8, "little"):
        bits = (bits ^ byte) * 0x100000001B3 % (1 << 64)
    return bits - (1 << 64) if bits >> 63 else bits


def name(number):
    return f"session_{number % (1 << 64):016x}"


def user_scope(user):
    """See `Scope` in src/domain/search.rs."""
    return f"_u{hashlib.sha256(len(user).to_bytes(8, 'big') + user.encode()).hexdigest()[:16]}_1"


# Both databases; `ids` holds the new sessions, `old_…` what is repeated.
STATEMENTS = """
INSERT INTO sessions ({sessions}) SELECT {sessions_values} FROM old_sessions o CROSS JOIN ids;
INSERT INTO session_memory ({session_memory}) SELECT {session_memory_values} FROM old_session_memory o CROSS JOIN ids;
WITH RECURSIVE numbers (turn) AS (SELECT 1 UNION ALL SELECT turn + 1 FROM numbers WHERE turn < {turns})
INSERT INTO turns ({turns_columns}) SELECT {turns_values} FROM numbers n CROSS JOIN ids
    JOIN old_turns o ON o.turn = 1 + (n.turn - 1) % {template} ORDER BY n.turn, ids.session_id;
WITH RECURSIVE numbers (turn) AS (SELECT 1 UNION ALL SELECT turn + 1 FROM numbers WHERE turn < {turns})
INSERT INTO search_entries ({search_entries}) SELECT {search_entries_values} FROM numbers n CROSS JOIN ids
    JOIN old_search_entries o ON o.turn = 1 + (n.turn - 1) % {template} ORDER BY n.turn, ids.session_id;
"""
TABLES = ["sessions", "session_memory", "turns", "search_entries"]


def fill(binary, database, *groups):
    """Adds groups of sessions: pairs of how many, and of how many turns each. Returns their ids, group by group."""
    with Server(binary, database) as server:
        template = server.call("POST", "/sessions", {"user_id": "template"})["session_id"]
        turns = [{"message": text(9), "response": text(18)} for _ in range(TEMPLATE)]
        server.call("POST", f"/sessions/{template}/turns", {"turns": turns})
    target = Sqlite(database) if database.startswith("sqlite:") else Postgres(database)
    columns = {table: [c for c in target.columns(table) if c != "entry_id"] for table in TABLES}
    old = int(template.removeprefix("session_"), 16)
    target.run("".join(f"CREATE TEMP TABLE old_{table} AS SELECT * FROM {table} WHERE session_id = "
                       f"{old - (1 << 64) if old >> 63 else old};" for table in TABLES))
    filled, first = [], 0
    for sessions, turns in groups:
        rows = [(session_id(n), f"user_{n}") for n in range(first, first + sessions)]
        target.ids([(id, user, user_scope(user), f"_{name(id)}_1") for id, user in rows])
        terms = target.terms(user_scope("template"), f"_{template}_1")
        values = {"session_id": "ids.session_id", "user_id": "ids.user_id", "last_turn": turns, "completed_turns": turns,
                  "turn": "n.turn", "terms": terms}
        listed = {table: ", ".join(columns[table]) for table in TABLES}
        target.run(STATEMENTS.format(
            turns=turns, template=TEMPLATE, turns_columns=listed.pop("turns"), **listed,
            **{f"{table}_values": ", ".join(str(values.get(c, f"o.{c}")) for c in columns[table]) for table in TABLES}))
        filled.append([name(id) for id, _ in rows])
        first += sessions
    target.finish()
    return filled


class Sqlite:
    def __init__(self, database):
        self.connection = sqlite3.connect(database.removeprefix("sqlite://"), isolation_level=None)
        self.run("PRAGMA synchronous = OFF; PRAGMA cache_size = -500000;"
                 "CREATE TEMP TABLE ids (session_id INTEGER, user_id TEXT, user_scope TEXT, session_scope TEXT);")

    def run(self, sql):
        self.connection.executescript(f"BEGIN; {sql}; COMMIT;" if "INSERT" in sql else sql)

    def columns(self, table):
        return [column[1] for column in self.connection.execute(f"PRAGMA table_info({table})")]

    def ids(self, rows):
        self.run("DELETE FROM ids")
        self.connection.execute("BEGIN")
        self.connection.executemany("INSERT INTO ids VALUES (?, ?, ?, ?)", rows)
        self.connection.execute("COMMIT")

    def terms(self, user_scope, session_scope):
        return (f"replace(replace(o.terms, '{user_scope}', ids.user_scope), "
                f"'{session_scope}', ids.session_scope)")

    def finish(self):
        self.run("INSERT INTO search_blocks (session_id, tenant_id) SELECT session_id, tenant_id FROM sessions WHERE true "
                 "ON CONFLICT DO NOTHING; INSERT INTO search_terms (search_terms) VALUES ('rebuild')")
        self.run("PRAGMA wal_checkpoint(TRUNCATE)")
        self.connection.close()


class Postgres:
    """One session of psql, which temporary tables need; it is told everything at the end."""

    def __init__(self, database):
        self.database = database
        # An index on terms is faster made anew than kept up.
        self.index = self.ask("SELECT indexdef FROM pg_indexes WHERE indexname = 'search_entries_terms'")
        self.script = ["SET synchronous_commit = off; SET maintenance_work_mem = '256MB'; SET work_mem = '256MB';"
                       "DROP INDEX search_entries_terms;"
                       "CREATE TEMP TABLE ids (session_id bigint, user_id text, user_scope text, session_scope text);"]

    def ask(self, sql):
        asked = ["psql", "-qAtX", "-v", "ON_ERROR_STOP=1", self.database, "-c", sql]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    def run(self, sql):
        self.script.append(sql)

    def columns(self, table):
        return self.ask(f"SELECT attname FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attnum > 0 "
                        "AND NOT attisdropped ORDER BY attnum").split()

    def ids(self, rows):
        lines = "\n".join("\t".join(map(str, row)) for row in rows)
        self.run(f"TRUNCATE ids; COPY ids FROM STDIN;\n{lines}\n\\.\n")

    def terms(self, user_scope, session_scope):
        return (f"array_to_tsvector(array_replace(array_replace(tsvector_to_array(o.terms), '{user_scope}', "
                f"ids.user_scope), '{session_scope}', ids.session_scope))")

    def finish(self):
        script = "\n".join([*self.script, f"{self.index};", "VACUUM ANALYZE;", "CHECKPOINT;"])
        subprocess.run(["psql", "-qX", "-v", "ON_ERROR_STOP=1", self.database], input=script, text=True, check=True)
