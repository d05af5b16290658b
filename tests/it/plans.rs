//! How the databases go about what the store sends: by an index, however much there is.
//!
//! The statements are those that are really sent, written down while the store's functions are called
//! ([`SENT`]). What goes through the writer's own task is not seen here; it names its rows by their keys.

use std::{sync::Arc, time::Duration};

use atlus::{
    domain::{
        caller::Caller,
        clock::Timestamp,
        ids::SessionId,
        memory::{Fact, MemoryPatch, ProfileChange},
        page::{Direction, Position},
        search::{Question, Scope},
        session::{Session, UserId},
        turn::TurnStatus,
    },
    store::{
        Cutoffs, Expired, Kind, Search, SessionFilter, SessionOrder, SessionPatch, Store, Summary, TurnKey,
        db::SENT,
    },
};
use serde_json::{Map, Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, Row, SqliteConnection};

use crate::harness::{Database, Server, on_both};

const NOW: Timestamp = Timestamp::from_millis(1_704_110_400_000);

/// Tables that grow with what is said. `erasures` and `user_erasures` do not: they hold what is being deleted.
const TABLES: [&str; 9] = [
    "sessions", "turns", "session_memory", "facts", "idempotency_records", "search_entries", "turn_pieces",
    "api_keys", "rate_windows",
];

/// What is sent for a call.
async fn sent<T>(call: impl Future<Output = T>) -> Vec<String> {
    SENT.scope(Arc::default(), async {
        call.await;
        SENT.with(|sent| std::mem::take(&mut *sent.lock().unwrap()))
    })
    .await
}

/// How a database goes about a statement, step by step.
async fn plan(database: &Database, statement: &str) -> Vec<String> {
    match database.kind {
        Kind::Sqlite => {
            let mut connection = SqliteConnection::connect(&database.direct).await.unwrap();
            let explain = format!("EXPLAIN QUERY PLAN {statement}");
            let plan = sqlx::query(AssertSqlSafe(explain)).fetch_all(&mut connection).await;
            let plan = plan.unwrap_or_else(|error| panic!("{error}: {statement}"));
            plan.iter().map(|row| row.get("detail")).collect()
        }
        Kind::Postgres => {
            let mut connection = database.as_server().await;
            let values = (1..=99).take_while(|n| statement.contains(&format!("${n}"))).count();
            let values = vec!["NULL"; values].join(", ");
            let values = if values.is_empty() { values } else { format!("({values})") };
            for prepare in [
                "SET enable_seqscan = off; SET plan_cache_mode = force_generic_plan".to_owned(),
                format!("PREPARE it AS {statement}"),
            ] {
                let prepared = connection.execute(sqlx::raw_sql(AssertSqlSafe(prepare))).await;
                prepared.unwrap_or_else(|error| panic!("{error}: {statement}"));
            }
            let explain = sqlx::raw_sql(AssertSqlSafe(format!("EXPLAIN EXECUTE it{values}")));
            connection.fetch_all(explain).await.unwrap().iter().map(|row| row.get(0)).collect()
        }
    }
}

/// The steps of a statement's plan that read more than they are asked for.
async fn scans(database: &Database, statement: &str) -> Vec<String> {
    let plan = plan(database, statement).await;
    match database.kind {
        Kind::Sqlite => {
            let is_scan = |step: &String| {
                let table = step.strip_prefix("SCAN ").and_then(|rest| rest.split(' ').next());
                table.is_some_and(|name| is_table(statement, name))
            };
            plan.into_iter().filter(is_scan).collect()
        }
        Kind::Postgres => {
            let is_node = |line: &String| line.contains("->") || line.contains("(cost=");
            let nodes = plan.iter().enumerate().filter(|(_, line)| {
                let table = line.split(" on ").nth(1).and_then(|rest| rest.split(' ').next());
                is_node(line) && line.contains(" Scan") && table.is_some_and(|name| TABLES.contains(&name))
            });
            let whole = nodes.filter(|(i, line)| {
                let details = plan[i + 1..].iter().take_while(|line| !is_node(line));
                let mut conditions = details.map(|line| line.trim_start());
                // A bitmap's condition stands at the index below it.
                !line.contains("Bitmap") && !conditions.any(|line| line.starts_with("Index Cond:"))
            });
            whole.map(|(_, line)| line.trim().to_owned()).collect()
        }
    }
}

/// Whether a plan's name is that of a table, or what the statement calls one.
fn is_table(statement: &str, name: &str) -> bool {
    let called = |table: &str| {
        statement.contains(&format!("{table} {name} ")) || statement.contains(&format!("{table} AS {name}"))
    };
    TABLES.contains(&name) || TABLES.into_iter().any(called)
}

/// A session with two turns and a fact; on Postgres, whose plans depend on it, among many others.
async fn filled(server: &Server) -> SessionId {
    let session = server.session(json!({"user_id": "ann", "metadata": {"a": 1}})).await;
    server.say(&session, "My name is Ann").await;
    server.say(&session, "I play the violin").await;
    if server.database.kind == Kind::Postgres {
        for many in [
            "INSERT INTO sessions (session_id, tenant_id, created_at, last_activity, temporary, user_id, metadata) \
             SELECT i, 1, i, i, false, 'user' || i, '{}' FROM generate_series(1, 5000) i",
            "INSERT INTO session_memory (session_id, tenant_id, updated_at) SELECT i, 1, i FROM generate_series(1, 5000) i",
            "INSERT INTO turns (session_id, tenant_id, turn, status, message_tokens, created_at, request_id, metadata, message, \
                 lease_expires_at) SELECT i, 1, t, CASE WHEN t = 4 THEN 'running' ELSE 'completed' END, 1, i, 'r', '{}', 'm', i \
             FROM generate_series(1, 5000) i, generate_series(1, 4) t",
            "INSERT INTO facts (tenant_id, user_id, key, session_id, turn, updated_at, value) \
             SELECT 1, 'user' || i, 'k' || k, i, k, i, '1' FROM generate_series(1, 5000) i, generate_series(1, 3) k",
            "INSERT INTO search_entries (session_id, tenant_id, turn, created_at, terms) \
             SELECT i, 1, t, i, array_to_tsvector(ARRAY['_t1', 'w' || i]) FROM generate_series(1, 5000) i, generate_series(1, 3) t",
            "INSERT INTO idempotency_records (tenant_id, user_id, idempotency_key, request_hash, session_id, lease_token, \
                 lease_expires_at, created_at, expires_at) \
             SELECT 1, '', 'k' || i, '', i, i, i, i, 4000000000000 + i FROM generate_series(1, 5000) i",
            "INSERT INTO rate_windows (bucket, ends_at, taken) SELECT i, 4000000000000 + i, 1 FROM generate_series(1, 5000) i",
        ] {
            server.run_sql(many).await;
        }
        server.database.run_sql("ANALYZE").await;
    }
    SessionId::parse(&session).unwrap()
}

fn metadata() -> Map<String, Value> {
    json!({"a": 1}).as_object().unwrap().clone()
}

/// Fails unless each call sends something and all of it goes by an index.
async fn assert_indexed(database: &Database, name: &str, statements: Vec<String>) {
    assert!(!statements.is_empty(), "{name} sent nothing");
    for statement in statements.iter().filter(|statement| !statement.contains("clock_timestamp")) {
        let scans = scans(database, statement).await;
        assert!(scans.is_empty(), "{name}: {scans:#?} for {statement}");
    }
}

on_both! {
    async fn what_reads_a_whole_table_is_noticed(database: Database) {
        for statement in [
            "SELECT turn FROM turns WHERE message = $1", "SELECT s.title FROM sessions s WHERE s.title = $1",
            "UPDATE facts SET value = $1 WHERE value = $2", "SELECT COUNT(*) FROM idempotency_records WHERE request_hash IS NULL",
        ] {
            assert_eq!(scans(&database, statement).await.len(), 1, "{statement}");
        }
    }

    async fn sessions_are_listed_by_an_index(server: Server) {
        filled(&server).await;
        let (store, position) = (&server.app.store, Position { key: NOW.as_millis(), id: 1 });
        for order in [SessionOrder::LastActivity, SessionOrder::CreatedAt] {
            for direction in [Direction::Desc, Direction::Asc] {
                for user in [None, Some(UserId::default())] {
                    for (after, is_active) in [(None, None), (Some(position), Some(true)), (Some(position), Some(false))] {
                        let filter = SessionFilter { user: user.clone(), is_active, ..SessionFilter::default() };
                        let list = sent(store.sessions(&Caller::ANYONE, &filter, (order, direction), after, 20, NOW)).await;
                        assert_indexed(&server.database, &format!("{filter:?} {order:?} {direction:?}"), list).await;
                    }
                }
            }
        }
        let newest = sent(store.newest_session(&Caller::ANYONE, &UserId::default(), NOW)).await;
        assert_indexed(&server.database, "newest session", newest).await;
    }

    async fn inactive_sessions_are_not_looked_for_among_active_ones(server: Server) {
        filled(&server).await;
        let filter = SessionFilter { is_active: Some(false), ..SessionFilter::default() };
        for (order, by) in [(SessionOrder::LastActivity, "activity"), (SessionOrder::CreatedAt, "creation")] {
            let list = sent(server.app.store.sessions(&Caller::ANYONE, &filter, (order, Direction::Desc), None, 20, NOW)).await;
            let plan = plan(&server.database, &list[0]).await.join("\n");
            for index in [format!("sessions_ended_by_{by}"), format!("sessions_expiring_by_{by}")] {
                assert!(plan.contains(&index), "{plan}");
            }
        }
    }

    async fn sessions_are_found_by_metadata_by_an_index(server: Server) {
        filled(&server).await;
        let filter = SessionFilter { metadata: metadata(), ..SessionFilter::default() };
        let order = (SessionOrder::LastActivity, Direction::Desc);
        let list = sent(server.app.store.sessions(&Caller::ANYONE, &filter, order, None, 20, NOW)).await;
        assert_indexed(&server.database, "metadata", list.clone()).await;
        if server.database.kind == Kind::Postgres {
            // Without the order that another index has, it is the one of metadata that is left.
            let mut connection = server.database.as_server().await;
            let index = "SELECT indexdef FROM pg_indexes WHERE tablename = 'sessions' AND indexdef ILIKE '%gin%jsonb%'";
            let (index,): (String,) = sqlx::query_as(index).fetch_one(&mut connection).await.unwrap();
            let indexed = index.split("USING gin (").nth(1).unwrap();
            assert!(indexed.contains("(metadata)::jsonb"), "{indexed}");
            let explain = format!(
                "SET enable_seqscan = off; SET enable_indexscan = off; SET plan_cache_mode = force_generic_plan; PREPARE it AS {}",
                list[0]
            );
            connection.execute(sqlx::raw_sql(AssertSqlSafe(explain))).await.unwrap();
            let plan = sqlx::raw_sql("EXPLAIN EXECUTE it(1, false, '{\"a\": 1}', 21)");
            let plan: Vec<String> = connection.fetch_all(plan).await.unwrap().iter().map(|row| row.get(0)).collect();
            assert!(plan.iter().any(|line| line.contains("Bitmap Index Scan")), "{plan:#?}");
        }
    }

    async fn what_belongs_to_a_session_is_read_by_an_index(server: Server) {
        let (store, id, me) = (&server.app.store, filled(&server).await, &Caller::ANYONE);
        let key = TurnKey { tenant: me.tenant, session: id, turn: 1, lease_token: 1 };
        let after = Some(Position { key: 1, id: 0 });
        let all = [
            ("session", sent(store.session(me, id)).await),
            ("memory", sent(store.memory(me, id)).await),
            ("latest turn", sent(store.latest_turn(me, id)).await),
            ("turn", sent(store.turn(me, id, 1)).await),
            ("turns", sent(store.turns(me, id, None, Direction::Asc, None, 20)).await),
            ("turns back", sent(store.turns(me, id, Some(TurnStatus::Completed), Direction::Desc, after, 20)).await),
            ("pieces", sent(store.pieces(me, id, 1)).await),
            ("turns by number", sent(store.turns_by_number((me.tenant, id), &[1, 2])).await),
            ("past turns", sent(store.past_turns(me.tenant, id, (1, 2), 10)).await),
            ("context", sent(store.context(key, 1000)).await),
            ("next context", sent(store.next_context(me, id, 1000)).await),
            ("fork point", sent(store.fork_point(me, id, None)).await),
            ("fork at", sent(store.fork_point(me, id, Some(1))).await),
        ];
        for (name, statements) in all {
            assert_indexed(&server.database, name, statements).await;
        }
    }

    async fn what_belongs_to_a_session_is_changed_by_an_index(server: Server) {
        let (store, id, me) = (&server.app.store, filled(&server).await, &Caller::ANYONE);
        let ann = UserId::try_from("ann".to_owned()).unwrap();
        let key = TurnKey { tenant: me.tenant, session: id, turn: 1, lease_token: 1 };
        let patch = MemoryPatch { working_memory: Some(metadata()), profile: ProfileChange { tone: Some("casual"), ..ProfileChange::default() } };
        let summary = Summary { text: "x".into(), tokens: 1, through: 1, takings: 0, was_through: None };
        let fact = Fact { key: "k".into(), value: json!(1) };
        let fork = Session { forked_from_session: Some(id), forked_from_turn: Some(2), ..Session::new(ann.clone(), NOW) };
        let expired = Expired { session_id: id, tenant_id: me.tenant, turn: 1 };
        let all = [
            ("update session", sent(store.update_session(me, id, SessionPatch::default(), None, NOW)).await),
            ("update memory", sent(store.update_memory(me, id, patch, None, NOW)).await),
            ("keep summary", sent(store.keep_summary(me.tenant, id, summary)).await),
            ("keep facts", sent(store.keep_facts(key, &ann, vec![fact])).await),
            ("fail turn", sent(store.fail_expired_turn(expired, NOW)).await),
            ("fork", sent(store.fork_session(me, fork, None)).await),
            ("reset memory", sent(store.reset_memory(me, id, None, NOW)).await),
        ];
        for (name, statements) in all {
            assert_indexed(&server.database, name, statements).await;
        }
    }

    async fn what_belongs_to_a_user_goes_by_an_index(server: Server) {
        let (store, me) = (&server.app.store, &Caller::ANYONE);
        filled(&server).await;
        let ann = UserId::try_from("ann".to_owned()).unwrap();
        let all = [
            ("facts", sent(store.facts(me, &ann)).await),
            ("user", sent(store.user(me, &ann)).await),
            ("update facts", sent(store.update_facts(me, &ann, &metadata(), NOW)).await),
            ("forget facts", sent(store.forget_facts(me, &ann)).await),
            ("erase user", sent(store.erase_user(me, &ann, NOW, |_| {})).await),
        ];
        for (name, statements) in all {
            assert_indexed(&server.database, name, statements).await;
        }
        assert_eq!(server.count("SELECT COUNT(*) FROM sessions WHERE user_id = 'ann'").await, 0);
    }

    async fn search_goes_by_its_index(server: Server) {
        let (store, id, tenant) = (&server.app.store, filled(&server).await, Caller::ANYONE.tenant);
        for scope in [Scope::Tenant, Scope::Session(id)] {
            let search = Search::new(Question::parse("violin \"play the\""), scope);
            let search = Search { from: Some(NOW), to: Some(NOW), ..search };
            assert_indexed(&server.database, "search", sent(store.search(tenant, &search)).await).await;
        }
        // One for what holds each word, one for what is ranked.
        let recalled = sent(store.bearing_turns((tenant, id), &Question::words("a violin played by Ann"), 9, 2)).await;
        assert_eq!(recalled.len(), 2, "{recalled:#?}");
        assert_indexed(&server.database, "recall", recalled).await;
        let search = Search::new(Question::parse("violin"), Scope::Tenant);
        let statements = sent(store.search(tenant, &search)).await;
        assert_eq!(statements.len(), 3, "{statements:#?}");
        assert_indexed(&server.database, "search", statements).await;
    }

    async fn jobs_look_by_an_index(server: Server) {
        let store: &Store = &server.app.store;
        filled(&server).await;
        let begun = "INSERT INTO erasures (session_id, tenant_id, created_at) SELECT session_id, tenant_id, 1 FROM sessions \
                     WHERE user_id = 'ann'";
        server.run_sql(begun).await;
        // Planned with the limit in sight, and a small part of all keys: else it would guess that a tenth of them is
        // to go, and reading them all were better indeed.
        let few = |sent: Vec<String>| sent.iter().map(|text| text.replace("LIMIT $2", "LIMIT 5")).collect();
        let forget_keys = few(sent(store.forget_keys(500)).await);
        let remove_windows = few(sent(store.remove_ended_windows(500)).await);
        let cutoffs = Cutoffs { any: NOW, temporary: NOW + Duration::from_secs(1) };
        let all = [
            ("expired turns", sent(store.expired_turns(None, 100)).await),
            ("expired turns of one", sent(store.expired_turns(Some((Caller::ANYONE.tenant, SessionId::random())), 1)).await),
            ("sessions to remove", sent(store.sessions_to_remove(cutoffs, 100)).await),
            ("forget keys", forget_keys),
            ("remove windows", remove_windows),
            ("take share", sent(store.take_share(1, 1, 1, Duration::from_secs(1))).await),
            ("forget user erasures", sent(store.forget_user_erasures(Duration::ZERO)).await),
            ("finish erasures", sent(store.finish_erasures(NOW, 100)).await),
        ];
        for (name, statements) in all {
            assert_indexed(&server.database, name, statements).await;
        }
        assert_eq!(server.count("SELECT COUNT(*) FROM erasures").await, 0);
    }
}
