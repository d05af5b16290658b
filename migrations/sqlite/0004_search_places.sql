-- The index of terms in the order of sessions: each session has a block of row ids, and its turns stand in it by their
-- numbers. So what one session holds of a term stands together, and is read without passing what others hold of it.
-- Postgres cannot order its index; the twin sets it up otherwise.
CREATE TABLE search_blocks (
    block      INTEGER NOT NULL PRIMARY KEY,
    session_id INTEGER NOT NULL,
    tenant_id  INTEGER NOT NULL,
    UNIQUE (session_id, tenant_id)
) STRICT;
INSERT INTO search_blocks (session_id, tenant_id) SELECT DISTINCT session_id, tenant_id FROM search_entries;

-- Entries by their rows in the index.
CREATE VIEW search_places AS
SELECT block << 28 | turn AS place, session_id, tenant_id, turn, created_at, terms
FROM search_blocks JOIN search_entries USING (session_id, tenant_id);

DROP TABLE search_terms;
CREATE VIRTUAL TABLE search_terms USING fts5 (
    terms, content = 'search_places', content_rowid = 'place', detail = 'none', columnsize = 0,
    tokenize = "ascii tokenchars '_'"
);
INSERT INTO search_terms (rowid, terms)
SELECT block << 28 | turn, terms FROM search_blocks JOIN search_entries USING (session_id, tenant_id)
ORDER BY block, turn;
