-- Every table of the contract, laid out once. The SQLite twin has the same tables, columns and keys.
--
-- Times are integers: milliseconds since 1970-01-01 UTC. JSON is text, so that it comes back as it went in.
-- What belongs to a session is keyed by session, then tenant (fit for distribution by session); what belongs
-- to a user or a tenant by tenant first. There are no triggers and no references between large tables:
-- deleting works in batches (see erasures).

-- What this schema asks of a binary: the oldest release that may run on it.
CREATE TABLE schema_info (
    singleton      BOOLEAN NOT NULL PRIMARY KEY CHECK (singleton),
    minimum_binary TEXT NOT NULL
);
INSERT INTO schema_info (singleton, minimum_binary) VALUES (true, '0.1.0');

CREATE TABLE tenants (
    tenant_id  BIGINT NOT NULL PRIMARY KEY,
    name       TEXT COLLATE "C" NOT NULL UNIQUE,
    created_at BIGINT NOT NULL
);
INSERT INTO tenants (tenant_id, name, created_at) VALUES (1, 'default', 0);

-- The row of a session is its lock: whoever writes to a session updates it first.
CREATE TABLE sessions (
    session_id          BIGINT NOT NULL,
    tenant_id           BIGINT NOT NULL,
    last_turn           BIGINT NOT NULL DEFAULT 0, -- the last number given
    completed_turns     BIGINT NOT NULL DEFAULT 0,
    running_turn        BIGINT,
    created_at          BIGINT NOT NULL,
    last_activity       BIGINT NOT NULL,
    ttl_seconds         BIGINT,
    expires_at          BIGINT,                    -- last_activity + ttl_seconds
    ended_at            BIGINT,
    waiting_token       BIGINT,                     -- whose message waits next for the session
    waiting_until       BIGINT,                     -- how long that counts, by the database's clock
    temporary           BOOLEAN NOT NULL,
    forked_from_session BIGINT,
    forked_from_turn    BIGINT,
    user_id             TEXT COLLATE "C" NOT NULL,
    title               TEXT,
    metadata            TEXT NOT NULL,
    system_prompt       TEXT,
    PRIMARY KEY (session_id, tenant_id)
);
CREATE INDEX sessions_by_activity ON sessions (tenant_id, temporary, last_activity, session_id);
CREATE INDEX sessions_by_creation ON sessions (tenant_id, temporary, created_at, session_id);
CREATE INDEX sessions_by_user_activity ON sessions (tenant_id, user_id, temporary, last_activity, session_id);
CREATE INDEX sessions_by_user_creation ON sessions (tenant_id, user_id, temporary, created_at, session_id);
CREATE INDEX sessions_by_metadata ON sessions USING gin ((metadata::jsonb) jsonb_path_ops);
CREATE INDEX sessions_expiring ON sessions (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX sessions_ended ON sessions (ended_at) WHERE ended_at IS NOT NULL;

CREATE TABLE turns (
    session_id        BIGINT NOT NULL,
    tenant_id         BIGINT NOT NULL,
    turn              BIGINT NOT NULL,
    status            TEXT NOT NULL CHECK (status IN ('running', 'completed', 'failed', 'cancelled', 'deleted')),
    message_tokens    BIGINT NOT NULL,
    response_tokens   BIGINT NOT NULL DEFAULT 0,
    created_at        BIGINT NOT NULL,
    completed_at      BIGINT,
    execution_us      BIGINT,
    prompt_tokens     BIGINT,
    completion_tokens BIGINT,
    total_tokens      BIGINT,
    lease_token       BIGINT,                      -- who runs it; a write without this token is refused
    lease_expires_at  BIGINT,                      -- by the database's clock
    request_id        TEXT NOT NULL,
    model             TEXT,
    error_code        TEXT,
    error_message     TEXT,
    metadata          TEXT NOT NULL,
    message           TEXT NOT NULL,
    response          TEXT,
    PRIMARY KEY (session_id, tenant_id, turn)
);
-- At most one turn of a session runs at a time.
CREATE UNIQUE INDEX turns_running ON turns (session_id, tenant_id) WHERE status = 'running';
CREATE INDEX turns_leased ON turns (lease_expires_at) WHERE status = 'running';

-- The text of a running turn as far as it was kept, for readers at other instances. Gone when the turn ends.
CREATE TABLE turn_pieces (
    session_id BIGINT NOT NULL,
    tenant_id  BIGINT NOT NULL,
    turn       BIGINT NOT NULL,
    start      BIGINT NOT NULL, -- offset in the reply, in bytes
    text       TEXT NOT NULL,
    PRIMARY KEY (session_id, tenant_id, turn, start)
);

-- One row per session, made with it: working memory, behaviour profile and summary.
CREATE TABLE session_memory (
    session_id      BIGINT NOT NULL,
    tenant_id       BIGINT NOT NULL,
    verbosity       TEXT NOT NULL DEFAULT 'medium' CHECK (verbosity IN ('low', 'medium', 'high')),
    tone            TEXT NOT NULL DEFAULT 'neutral' CHECK (tone IN ('casual', 'neutral', 'technical')),
    depth           TEXT NOT NULL DEFAULT 'normal' CHECK (depth IN ('shallow', 'normal', 'advanced')),
    updated_at      BIGINT NOT NULL,
    summary_through BIGINT,
    summary_tokens  BIGINT NOT NULL DEFAULT 0,
    summary         TEXT,
    working_memory  TEXT NOT NULL DEFAULT '{}',
    PRIMARY KEY (session_id, tenant_id),
    FOREIGN KEY (session_id, tenant_id) REFERENCES sessions (session_id, tenant_id) ON DELETE CASCADE
);

-- What is known about a user, one row per source turn; the newest row of a key counts.
-- Session 0, turn 0: stated through the API.
CREATE TABLE facts (
    tenant_id  BIGINT NOT NULL,
    user_id    TEXT COLLATE "C" NOT NULL,
    key        TEXT COLLATE "C" NOT NULL,
    session_id BIGINT NOT NULL DEFAULT 0,
    turn       BIGINT NOT NULL DEFAULT 0,
    updated_at BIGINT NOT NULL,
    value      TEXT NOT NULL,
    PRIMARY KEY (tenant_id, user_id, key, session_id, turn)
);
CREATE INDEX facts_by_source ON facts (session_id, tenant_id, turn);

-- Remembered answers. The answer is text, since it comes back byte for byte.
CREATE TABLE idempotency_records (
    tenant_id        BIGINT NOT NULL,
    user_id          TEXT COLLATE "C" NOT NULL,                 -- empty for a key that is bound to no user
    idempotency_key  TEXT COLLATE "C" NOT NULL,
    request_hash     BYTEA NOT NULL,
    session_id       BIGINT,
    turn             BIGINT,
    status           BIGINT,                       -- absent while the first request runs
    lease_token      BIGINT NOT NULL,
    lease_expires_at BIGINT NOT NULL,
    created_at       BIGINT NOT NULL,
    expires_at       BIGINT NOT NULL,
    answer           TEXT,
    PRIMARY KEY (tenant_id, user_id, idempotency_key)
);
CREATE INDEX idempotency_records_by_session ON idempotency_records (session_id, tenant_id, turn);
CREATE INDEX idempotency_records_expiring ON idempotency_records (expires_at);

CREATE TABLE api_keys (
    key_id       BIGINT NOT NULL,
    tenant_id    BIGINT NOT NULL,
    name         TEXT NOT NULL,
    secret_hash  BYTEA NOT NULL UNIQUE,
    scopes       TEXT NOT NULL,
    user_id      TEXT COLLATE "C",
    created_at   BIGINT NOT NULL,
    expires_at   BIGINT,
    last_used_at BIGINT,
    revoked_at   BIGINT,
    PRIMARY KEY (tenant_id, key_id)
);

-- Sessions that are deleted but whose turns and facts are not yet all removed.
CREATE TABLE erasures (
    session_id BIGINT NOT NULL,
    tenant_id  BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (session_id, tenant_id)
);
