-- Search, where memory came from, and users who were erased. The Postgres twin has the same tables and columns.

-- One entry per completed turn: digests of the distinct terms of its message and response, which our code makes (see
-- src/domain/search.rs), so that both databases find the same, and the scopes it can be found in.
CREATE TABLE search_entries (
    entry_id   INTEGER NOT NULL PRIMARY KEY,
    session_id INTEGER NOT NULL,
    tenant_id  INTEGER NOT NULL,
    turn       INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    terms      TEXT NOT NULL,
    UNIQUE (session_id, tenant_id, turn)
) STRICT;
-- Terms are parted by spaces and hold letters and digits only; those of scopes begin with an underscore. They are
-- digests, since FTS5 keeps what was deleted in its segments until these are merged, and its own way to prevent that
-- (secure-delete) takes seconds for a batch of long turns and leaves some words even so.
CREATE VIRTUAL TABLE search_terms USING fts5 (
    terms, content = 'search_entries', content_rowid = 'entry_id', detail = 'none', columnsize = 0,
    tokenize = "ascii tokenchars '_'"
);

-- How far the turns of before this migration are indexed: by which version of the terms.
ALTER TABLE schema_info ADD COLUMN search_version INTEGER NOT NULL DEFAULT 0;

-- How many of the completed turns were erased.
ALTER TABLE sessions ADD COLUMN erased_turns INTEGER NOT NULL DEFAULT 0;

-- The turn whose message changed each part of the profile; null where it is the default or was set by the API.
ALTER TABLE session_memory ADD COLUMN verbosity_turn INTEGER;
ALTER TABLE session_memory ADD COLUMN tone_turn INTEGER;
ALTER TABLE session_memory ADD COLUMN depth_turn INTEGER;
-- Counts what was taken away from a session, so that nothing made of it before is kept after.
ALTER TABLE session_memory ADD COLUMN takings INTEGER NOT NULL DEFAULT 0;

-- The newest of a user's facts.
CREATE INDEX facts_newest ON facts (tenant_id, user_id, updated_at, turn);

-- The last of the turns that a remembered answer is about, where they are several.
ALTER TABLE idempotency_records ADD COLUMN last_turn INTEGER;

-- The session that one is being copied from, which takes the unfinished copy with it.
ALTER TABLE erasures ADD COLUMN copied_from INTEGER;

-- Users who were erased: nothing that was begun before may be kept for them after. A digest names the user.
CREATE TABLE user_erasures (
    tenant_id   INTEGER NOT NULL,
    user_digest INTEGER NOT NULL,
    erased_at   INTEGER NOT NULL, -- by the database's clock
    UNIQUE (tenant_id, user_digest)
) STRICT;
CREATE INDEX user_erasures_old ON user_erasures (erased_at);
