//! What a chat says to the database, in batches: the statements of `src/store/` (`admissions.rs`, `endings.rs`,
//! `context.rs`, `search.rs`) for a message to a session that is there, free and its caller's, and an answer of which
//! nothing is learnt.

pub const TENANT: i64 = 1;
pub const LEASE_MS: i64 = 15_000;
/// What a context may hold, and what the statement asks for: the rest is the prompt's and the message's.
pub const CONTEXT_TOKENS: i64 = 8000;
/// What the built-in responder answers to the load's message, and what both are found by.
pub const RESPONSE: &str = "I am ATLUS's built-in responder and cannot answer that. Set ATLUS_MODEL_URL and \
     ATLUS_MODEL to connect a real model.";
pub const TERMS: &str = "3nez2g4i4r ouvmllphpr b7dihte3bb ukqlzjbaio djh6kd5dg5 3jctufrzy3 nwostwqbqa zxk6z44nro \
     6p6tb6w44n ypb525ooli vsh67qb3b4 wofto2ltxl";

/// Gives the session its next number. Both databases.
macro_rules! number {
    () => {
        "UPDATE sessions SET last_turn = last_turn + 1, running_turn = last_turn + 1, \
             last_activity = CASE WHEN last_activity > a.now THEN last_activity ELSE a.now END, \
             expires_at = CASE WHEN last_activity > a.now THEN last_activity ELSE a.now END + ttl_seconds * 1000, \
             waiting_token = CASE WHEN waiting_token = a.token THEN NULL ELSE waiting_token END \
         FROM admitted a \
         WHERE sessions.session_id = a.session AND sessions.tenant_id = a.tenant AND running_turn IS NULL \
             AND ended_at IS NULL AND (expires_at IS NULL OR expires_at > a.now) \
             AND (waiting_token IS NULL OR waiting_token = a.token OR waiting_until < a.now) \
         RETURNING sessions.session_id, last_turn, temporary, user_id"
    };
}

/// Keeps the message, under the number that the session gave.
macro_rules! keep {
    ($number:literal, $from:literal) => {
        concat!(
            "INSERT INTO turns (session_id, tenant_id, turn, status, message, message_tokens, metadata, request_id, ",
            "created_at, lease_token, lease_expires_at) SELECT a.session, a.tenant, ", $number,
            ", 'running', a.message, a.tokens, '{}', a.request, a.now, a.token, a.lease FROM ", $from
        )
    };
}

macro_rules! free {
    () => {
        "UPDATE sessions SET running_turn = NULL, completed_turns = completed_turns + 1 FROM ended e \
         WHERE sessions.session_id = e.session AND sessions.tenant_id = e.tenant AND running_turn = e.turn"
    };
}

macro_rules! complete {
    () => {
        "UPDATE turns SET status = 'completed', completed_at = e.now, execution_us = e.execution, \
             response = e.response, response_tokens = e.tokens, model = 'builtin', prompt_tokens = NULL, \
             completion_tokens = NULL, total_tokens = NULL, error_code = NULL, error_message = NULL FROM ended e \
         WHERE turns.session_id = e.session AND turns.tenant_id = e.tenant AND turns.turn = e.turn \
             AND turns.lease_token = e.token AND turns.status = 'running'"
    };
}

/// Keeps what the turn is found by, written as the database does.
macro_rules! enter {
    ($terms:literal) => {
        concat!(
            "INSERT INTO search_entries (session_id, tenant_id, turn, created_at, terms) ",
            "SELECT e.session, e.tenant, e.turn, e.now, ",
            $terms,
            " FROM ended e"
        )
    };
}

/// What a model may be shown; see `src/store/context.rs`.
macro_rules! context {
    ($array:literal, $list:literal) => {
        concat!(
            "SELECT s.system_prompt, m.verbosity, m.tone, m.depth, m.working_memory, m.summary, m.summary_through, ",
            "m.takings, s.completed_turns - s.erased_turns AS all_turns, ",
            "CAST(COALESCE((SELECT ", $list, "(", $array,
            "(t.turn, t.message, t.response, t.message_tokens + t.response_tokens) ORDER BY t.turn) ",
            "FROM turns t WHERE t.session_id = $1 AND t.tenant_id = $2 AND t.status = 'completed' ",
            "AND t.turn < $3 AND t.turn > COALESCE((SELECT turn FROM (SELECT turn, ",
            "SUM(message_tokens + response_tokens + 8) OVER back AS total, ROW_NUMBER() OVER back AS place FROM turns ",
            "WHERE session_id = $1 AND tenant_id = $2 AND status = 'completed' AND turn < $3 ",
            "WINDOW back AS (ORDER BY turn DESC ROWS UNBOUNDED PRECEDING)) sums ",
            "WHERE total > $4 OR place > 1000 LIMIT 1), 0)), '[]') AS TEXT) AS turns, ",
            "CAST(COALESCE((SELECT ", $list, "(", $array, "(f.key, f.value) ORDER BY f.updated_at, f.turn, f.key) FROM ",
            "(SELECT key, value, updated_at, turn FROM (SELECT key, value, updated_at, turn, ROW_NUMBER() OVER ",
            "(PARTITION BY key ORDER BY updated_at DESC, turn DESC, session_id DESC) AS place FROM facts ",
            "WHERE tenant_id = $2 AND user_id = s.user_id) stated WHERE place = 1 ",
            "ORDER BY updated_at DESC, turn DESC, key LIMIT 500) f), '[]') AS TEXT) AS facts ",
            "FROM sessions s JOIN session_memory m ON m.session_id = s.session_id AND m.tenant_id = s.tenant_id ",
            "WHERE s.session_id = $1 AND s.tenant_id = $2 AND EXISTS (SELECT 1 FROM turns r WHERE r.session_id = $1 ",
            "AND r.tenant_id = $2 AND r.turn = $3 AND r.status = 'running' AND r.lease_token = $5)"
        )
    };
}

/// The rows of a batch are a JSON array of arrays, `$1`. jsonb_each keeps them read, where json_each writes each as text
/// for every column to read again.
pub mod sqlite {
    macro_rules! admitted {
        () => {
            "WITH admitted AS (SELECT value ->> 0 AS session, value ->> 1 AS tenant, value ->> 2 AS now, \
                 value ->> 3 AS token, value ->> 4 AS lease, value ->> 5 AS tokens, value ->> 6 AS request, \
                 value ->> 7 AS message, value ->> 8 AS number FROM jsonb_each($1)) "
        };
    }
    macro_rules! ended {
        () => {
            "WITH ended AS (SELECT value ->> 0 AS session, value ->> 1 AS tenant, value ->> 2 AS turn, \
                 value ->> 3 AS token, value ->> 4 AS now, value ->> 5 AS execution, value ->> 6 AS tokens, \
                 value ->> 7 AS response, value ->> 8 AS terms FROM jsonb_each($1)) "
        };
    }
    pub const NUMBER: &str = concat!(admitted!(), number!());
    /// The numbers have come back, and stand in the rows.
    pub const KEEP: &str = concat!(admitted!(), keep!("a.number", "admitted a"));
    pub const FREE: &str = concat!(ended!(), free!());
    pub const COMPLETE: &str = concat!(ended!(), complete!());
    pub const ENTER: &str = concat!(ended!(), enter!("e.terms"));
    pub const PLACE: &str = concat!(
        ended!(),
        "INSERT INTO search_blocks (session_id, tenant_id) SELECT session, tenant FROM ended WHERE true ",
        "ON CONFLICT DO NOTHING"
    );
    pub const INDEX: &str = concat!(
        ended!(),
        "INSERT INTO search_terms (rowid, terms) SELECT p.place, p.terms FROM ended e CROSS JOIN search_places p ",
        "ON p.session_id = e.session AND p.tenant_id = e.tenant AND p.turn = e.turn ORDER BY p.place"
    );
    pub const CONTEXT: &str = context!("json_array", "json_group_array");
}

/// The rows of a batch are arrays, one per column. A batch of one kind is one statement.
pub mod postgres {
    macro_rules! admit {
        ($rows:literal) => {
            concat!(
                "WITH admitted (session, tenant, now, token, lease, tokens, request, message) AS (",
                $rows,
                "), \
                 numbered AS (",
                number!(),
                "), kept AS (",
                keep!("n.last_turn", "admitted a JOIN numbered n ON n.session_id = a.session"),
                ") "
            )
        };
    }
    macro_rules! end {
        ($rows:literal) => {
            concat!(
                "WITH ended (session, tenant, turn, token, now, execution, tokens, response, terms) AS (",
                $rows,
                "), \
                 freed AS (",
                free!(),
                "), completed AS (",
                complete!(),
                ") ",
                enter!("array_to_tsvector(string_to_array(e.terms, ' '))")
            )
        };
    }
    pub const ADMIT: &str = concat!(
        admit!(
            "SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], \
             $6::bigint[], $7::text[], $8::text[])"
        ),
        "SELECT session_id, last_turn, temporary, user_id FROM numbered"
    );
    pub const END: &str = end!(
        "SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], \
             $7::bigint[], $8::text[], $9::text[])"
    );
    pub const CONTEXT: &str = context!("json_build_array", "json_agg");

    /// The same chat for pgbench, which is told the first and the last of the sessions: one statement per write, each
    /// its own transaction. A session that is busy is left alone.
    pub fn pgbench() -> String {
        const NOW: &str = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint";
        let admit = admit!(
            "SELECT :session::bigint, 1::bigint, NOW, :token::bigint, NOW + 15000, 12::bigint, \
             'req_' || to_hex(:token::bigint), 'What would you say about number ' || :n::text || ' of the list?'"
        );
        let end = end!(
            "SELECT :session::bigint, 1::bigint, :turn::bigint, :token::bigint, NOW, 1::bigint, \
             29::bigint, 'RESPONSE', '_t1 _u' || to_hex(:session::bigint) || '_1 _session_' || \
             to_hex(:session::bigint) || '_1 TERMS ' || to_hex(:token::bigint) WHERE :turn::bigint > 0"
        );
        let named = |sql: &str| {
            let sql = sql.replace("NOW", NOW).replace("RESPONSE", &super::RESPONSE.replace('\'', "''"));
            let sql = sql.replace("TERMS", super::TERMS).replace("$1", ":session::bigint").replace("$2", "1");
            let sql = sql.replace("$3", ":turn::bigint").replace("$4", &super::CONTEXT_TOKENS.to_string());
            sql.replace("$5", ":token::bigint")
        };
        format!(
            "\\set n random(:first, :last)\n\\set session hash_fnv1a(:n, 0)\n\
             \\set token random(1, 9000000000000000000)\n\
             {} SELECT COALESCE((SELECT last_turn FROM numbered), 0) AS turn \\gset\n{};\n{};\n",
            named(admit),
            named(CONTEXT),
            named(end)
        )
    }
}
