-- Keys, limits and budgets. The SQLite twin has the same tables and columns.

-- A revoked key is removed: what is kept of it is the audit log's affair.
ALTER TABLE api_keys DROP COLUMN revoked_at;
CREATE INDEX api_keys_newest ON api_keys (tenant_id, created_at, key_id);
CREATE INDEX api_keys_by_user ON api_keys (tenant_id, user_id) WHERE user_id IS NOT NULL;

-- How many calls the instances have taken for themselves out of a client's window. A digest names the client. Nothing
-- is lost with it but the count of a minute, so it is not in the log of the database.
CREATE UNLOGGED TABLE rate_windows (
    bucket  BIGINT NOT NULL PRIMARY KEY,
    ends_at BIGINT NOT NULL, -- by the database's clock
    taken   BIGINT NOT NULL
);
CREATE INDEX rate_windows_ended ON rate_windows (ends_at);

-- The tokens that pieces of work have used of a user's budget on a day (days since 1970-01-01, UTC), where there is one.
CREATE TABLE token_uses (
    tenant_id BIGINT NOT NULL,
    user_id   TEXT COLLATE "C" NOT NULL,
    day       BIGINT NOT NULL,
    work      BIGINT NOT NULL, -- random
    tokens    BIGINT NOT NULL,
    PRIMARY KEY (tenant_id, user_id, day, work)
);
CREATE INDEX token_uses_old ON token_uses (day);
