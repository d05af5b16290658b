-- Keys, limits and budgets. The Postgres twin has the same tables and columns.

-- A revoked key is removed: what is kept of it is the audit log's affair.
ALTER TABLE api_keys DROP COLUMN revoked_at;
CREATE INDEX api_keys_newest ON api_keys (tenant_id, created_at, key_id);
CREATE INDEX api_keys_by_user ON api_keys (tenant_id, user_id) WHERE user_id IS NOT NULL;

-- How many calls the instances have taken for themselves out of a client's window; used on Postgres only. A digest names
-- the client.
CREATE TABLE rate_windows (
    bucket  INTEGER NOT NULL PRIMARY KEY,
    ends_at INTEGER NOT NULL, -- by the database's clock
    taken   INTEGER NOT NULL
) STRICT;
CREATE INDEX rate_windows_ended ON rate_windows (ends_at);

-- The tokens that pieces of work have used of a user's budget on a day (days since 1970-01-01, UTC), where there is one.
CREATE TABLE token_uses (
    tenant_id INTEGER NOT NULL,
    user_id   TEXT NOT NULL,
    day       INTEGER NOT NULL,
    work      INTEGER NOT NULL, -- random
    tokens    INTEGER NOT NULL,
    PRIMARY KEY (tenant_id, user_id, day, work)
) STRICT;
CREATE INDEX token_uses_old ON token_uses (day);
