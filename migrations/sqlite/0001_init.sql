-- Every table of the contract, laid out once. The Postgres twin has the same tables, columns and keys.
--
-- Times are integers: milliseconds since 1970-01-01 UTC. JSON is text, so that it comes back as it went in.
-- What belongs to a session is keyed by session, then tenant (fit for distribution by session); what belongs
-- to a user or a tenant by tenant first. There are no triggers and no references between large tables:
-- deleting works in batches (see erasures).

-- What this schema asks of a binary: the oldest release that may run on it.
CREATE TABLE schema_info (
    singleton      INTEGER NOT NULL PRIMARY KEY CHECK (singleton = 1),
    minimum_binary TEXT NOT NULL
) STRICT;
INSERT INTO schema_info (singleton, minimum_binary) VALUES (1, '0.1.0');

CREATE TABLE tenants (
    tenant_id  INTEGER NOT NULL PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    created_at INTEGER NOT NULL
) STRICT;
INSERT INTO tenants (tenant_id, name, created_at) VALUES (1, 'default', 0);

-- The row of a session is its lock: whoever writes to a session updates it first.
CREATE TABLE sessions (
    session_id          INTEGER NOT NULL,
    tenant_id           INTEGER NOT NULL,
    last_turn           INTEGER NOT NULL DEFAULT 0, -- the last number given
    completed_turns     INTEGER NOT NULL DEFAULT 0,
    running_turn        INTEGER,
    created_at          INTEGER NOT NULL,
    last_activity       INTEGER NOT NULL,
    ttl_seconds         INTEGER,
    expires_at          INTEGER,                    -- last_activity + ttl_seconds
    ended_at            INTEGER,
    waiting_token       INTEGER,                    -- whose message waits next for the session
    waiting_until       INTEGER,                    -- how long that counts, by the database's clock
    temporary           INTEGER NOT NULL,
    forked_from_session INTEGER,
    forked_from_turn    INTEGER,
    user_id             TEXT NOT NULL,
    title               TEXT,
    metadata            TEXT NOT NULL,
    system_prompt       TEXT,
    UNIQUE (session_id, tenant_id)
) STRICT;
CREATE INDEX sessions_by_activity ON sessions (tenant_id, temporary, last_activity, session_id);
CREATE INDEX sessions_by_creation ON sessions (tenant_id, temporary, created_at, session_id);
CREATE INDEX sessions_by_user_activity ON sessions (tenant_id, user_id, temporary, last_activity, session_id);
CREATE INDEX sessions_by_user_creation ON sessions (tenant_id, user_id, temporary, created_at, session_id);
CREATE INDEX sessions_expiring ON sessions (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX sessions_ended ON sessions (ended_at) WHERE ended_at IS NOT NULL;

-- An ordinary table with a unique index: turns are appended in order of arrival, which SQLite writes fastest.
CREATE TABLE turns (
    session_id        INTEGER NOT NULL,
    tenant_id         INTEGER NOT NULL,
    turn              INTEGER NOT NULL,
    status            TEXT NOT NULL CHECK (status IN ('running', 'completed', 'failed', 'cancelled', 'deleted')),
    message_tokens    INTEGER NOT NULL,
    response_tokens   INTEGER NOT NULL DEFAULT 0,
    created_at        INTEGER NOT NULL,
    completed_at      INTEGER,
    execution_us      INTEGER,
    prompt_tokens     INTEGER,
    completion_tokens INTEGER,
    total_tokens      INTEGER,
    lease_token       INTEGER,                      -- who runs it; a write without this token is refused
    lease_expires_at  INTEGER,                      -- by the database's clock
    request_id        TEXT NOT NULL,
    model             TEXT,
    error_code        TEXT,
    error_message     TEXT,
    metadata          TEXT NOT NULL,
    message           TEXT NOT NULL,
    response          TEXT,
    UNIQUE (session_id, tenant_id, turn)
) STRICT;
-- At most one turn of a session runs at a time.
CREATE UNIQUE INDEX turns_running ON turns (session_id, tenant_id) WHERE status = 'running';
CREATE INDEX turns_leased ON turns (lease_expires_at) WHERE status = 'running';

-- The text of a running turn as far as it was kept, for readers at other instances. Gone when the turn ends.
CREATE TABLE turn_pieces (
    session_id INTEGER NOT NULL,
    tenant_id  INTEGER NOT NULL,
    turn       INTEGER NOT NULL,
    start      INTEGER NOT NULL, -- offset in the reply, in bytes
    text       TEXT NOT NULL,
    UNIQUE (session_id, tenant_id, turn, start)
) STRICT;

-- One row per session, made with it: working memory, behaviour profile and summary.
CREATE TABLE session_memory (
    session_id      INTEGER NOT NULL,
    tenant_id       INTEGER NOT NULL,
    verbosity       TEXT NOT NULL DEFAULT 'medium' CHECK (verbosity IN ('low', 'medium', 'high')),
    tone            TEXT NOT NULL DEFAULT 'neutral' CHECK (tone IN ('casual', 'neutral', 'technical')),
    depth           TEXT NOT NULL DEFAULT 'normal' CHECK (depth IN ('shallow', 'normal', 'advanced')),
    updated_at      INTEGER NOT NULL,
    summary_through INTEGER,
    summary_tokens  INTEGER NOT NULL DEFAULT 0,
    summary         TEXT,
    working_memory  TEXT NOT NULL DEFAULT '{}',
    UNIQUE (session_id, tenant_id),
    FOREIGN KEY (session_id, tenant_id) REFERENCES sessions (session_id, tenant_id) ON DELETE CASCADE
) STRICT;

-- What is known about a user, one row per source turn; the newest row of a key counts.
-- Session 0, turn 0: stated through the API.
CREATE TABLE facts (
    tenant_id  INTEGER NOT NULL,
    user_id    TEXT NOT NULL,
    key        TEXT NOT NULL,
    session_id INTEGER NOT NULL DEFAULT 0,
    turn       INTEGER NOT NULL DEFAULT 0,
    updated_at INTEGER NOT NULL,
    value      TEXT NOT NULL,
    UNIQUE (tenant_id, user_id, key, session_id, turn)
) STRICT;
CREATE INDEX facts_by_source ON facts (session_id, tenant_id, turn);

-- Remembered answers. The answer is text, since it comes back byte for byte.
CREATE TABLE idempotency_records (
    tenant_id        INTEGER NOT NULL,
    user_id          TEXT NOT NULL,                 -- empty for a key that is bound to no user
    idempotency_key  TEXT NOT NULL,
    request_hash     BLOB NOT NULL,
    session_id       INTEGER,
    turn             INTEGER,
    status           INTEGER,                       -- absent while the first request runs
    lease_token      INTEGER NOT NULL,
    lease_expires_at INTEGER NOT NULL,
    created_at       INTEGER NOT NULL,
    expires_at       INTEGER NOT NULL,
    answer           TEXT,
    UNIQUE (tenant_id, user_id, idempotency_key)
) STRICT;
CREATE INDEX idempotency_records_by_session ON idempotency_records (session_id, tenant_id, turn);
CREATE INDEX idempotency_records_expiring ON idempotency_records (expires_at);

CREATE TABLE api_keys (
    key_id       INTEGER NOT NULL,
    tenant_id    INTEGER NOT NULL,
    name         TEXT NOT NULL,
    secret_hash  BLOB NOT NULL UNIQUE,
    scopes       TEXT NOT NULL,
    user_id      TEXT,
    created_at   INTEGER NOT NULL,
    expires_at   INTEGER,
    last_used_at INTEGER,
    revoked_at   INTEGER,
    UNIQUE (tenant_id, key_id)
) STRICT;

-- Sessions that are deleted but whose turns and facts are not yet all removed.
CREATE TABLE erasures (
    session_id INTEGER NOT NULL,
    tenant_id  INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    UNIQUE (session_id, tenant_id)
) STRICT;
