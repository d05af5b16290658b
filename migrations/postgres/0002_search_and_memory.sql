-- Search, where memory came from, and users who were erased. The SQLite twin has the same tables and columns.

-- One entry per completed turn: digests of the distinct terms of its message and response, which our code makes (see
-- src/domain/search.rs), so that both databases find the same, and the scopes it can be found in.
CREATE TABLE search_entries (
    session_id BIGINT NOT NULL,
    tenant_id  BIGINT NOT NULL,
    turn       BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    terms      TSVECTOR NOT NULL,
    UNIQUE (session_id, tenant_id, turn)
);
CREATE INDEX search_entries_terms ON search_entries USING GIN (terms);

-- How far the turns of before this migration are indexed: by which version of the terms.
ALTER TABLE schema_info ADD COLUMN search_version BIGINT NOT NULL DEFAULT 0;

-- How many of the completed turns were erased.
ALTER TABLE sessions ADD COLUMN erased_turns BIGINT NOT NULL DEFAULT 0;

-- The turn whose message changed each part of the profile; null where it is the default or was set by the API.
ALTER TABLE session_memory ADD COLUMN verbosity_turn BIGINT;
ALTER TABLE session_memory ADD COLUMN tone_turn BIGINT;
ALTER TABLE session_memory ADD COLUMN depth_turn BIGINT;
-- Counts what was taken away from a session, so that nothing made of it before is kept after.
ALTER TABLE session_memory ADD COLUMN takings BIGINT NOT NULL DEFAULT 0;

-- The newest of a user's facts.
CREATE INDEX facts_newest ON facts (tenant_id, user_id, updated_at, turn);

-- The last of the turns that a remembered answer is about, where they are several.
ALTER TABLE idempotency_records ADD COLUMN last_turn BIGINT;

-- The session that one is being copied from, which takes the unfinished copy with it.
ALTER TABLE erasures ADD COLUMN copied_from BIGINT;

-- Users who were erased: nothing that was begun before may be kept for them after. A digest names the user.
CREATE TABLE user_erasures (
    tenant_id   BIGINT NOT NULL,
    user_digest BIGINT NOT NULL,
    erased_at   BIGINT NOT NULL, -- by the database's clock
    UNIQUE (tenant_id, user_digest)
);
CREATE INDEX user_erasures_old ON user_erasures (erased_at);
