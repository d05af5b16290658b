//! The store below the HTTP surface: what cannot be brought about from outside.

use std::{sync::Arc, time::Duration};

use atlus::{
    domain::{
        caller::Caller,
        clock::Timestamp,
        ids::{RequestId, SessionId},
        json::Metadata,
        page::Direction,
        session::{Session, UserId},
    },
    store::{
        self, Admission, ConnectError, Cutoffs, Deleted, Destination, Ended, Ending, NotAdmitted, OnlyIf,
        SessionPatch, Store, TurnKey,
    },
};

use crate::harness::{Database, completion, on_both};

/// Whoever asks.
static ANYONE: Caller = Caller::ANYONE;

const NOW: Timestamp = Timestamp::from_millis(1_704_110_400_000);

fn admission(session: Destination, lease_token: i64) -> Admission {
    Admission {
        session,
        message: "hi".into(),
        message_tokens: 1,
        metadata: Metadata::default(),
        request_id: RequestId::random(),
        now: NOW,
        lease_token,
        lease: Duration::from_secs(15),
        interrupt: false,
        wait: false,
        claim: None,
        budget: None,
    }
}

fn existing(id: SessionId) -> Destination {
    Destination::Existing { id, user: None }
}

async fn session(store: &Store) -> SessionId {
    let session = Session::new(UserId::default(), NOW);
    store.insert_session(&ANYONE, session.clone(), None).await.unwrap();
    session.id
}

on_both! {
    async fn a_write_that_fails_does_not_fail_those_it_shared_a_transaction_with(database: Database) {
        let store = database.store().await;
        let taken = Session::new(UserId::default(), NOW);
        store.insert_session(&ANYONE, taken.clone(), None).await.unwrap();
        let good: Vec<_> = (0..100).map(|_| Session::new(UserId::default(), NOW)).collect();
        let writes = good.iter().flat_map(|session| [session.clone(), taken.clone()]);
        let outcomes = futures_util::future::join_all(
            writes.map(|session| store.insert_session(&ANYONE, session, None))
        ).await;
        for (i, outcome) in outcomes.into_iter().enumerate() {
            match i % 2 {
                0 => outcome.unwrap(),
                _ => assert!(matches!(outcome, Err(store::Error::Taken { .. }))),
            }
        }
        for session in good {
            assert!(store.session(&ANYONE, session.id).await.unwrap().is_some());
        }
    }

    async fn a_write_is_done_though_nobody_waits_for_it(database: Database) {
        let store = database.store().await;
        let session = Session::new(UserId::default(), NOW);
        let mut write = Box::pin(store.insert_session(&ANYONE, session.clone(), None));
        assert!(futures_util::poll!(&mut write).is_pending());
        drop(write);
        while store.session(&ANYONE, session.id).await.unwrap().is_none() {
            tokio::task::yield_now().await;
        }
    }

    async fn one_turn_of_a_session_runs_at_a_time_whatever_the_number_of_servers(database: Database) {
        let stores = [database.store().await, database.store().await];
        let id = session(&stores[0]).await;
        let attempts = (1..=20).map(|token| {
            let (store, admission) = (&stores[usize::from(token % 2 == 0)], admission(existing(id), token));
            store.admit_turn(&ANYONE, admission)
        });
        let outcomes = futures_util::future::join_all(attempts).await;
        let admitted = outcomes.iter().filter(|outcome| matches!(outcome, Ok(Ok(turn)) if turn.turn == 1)).count();
        let busy = outcomes.iter().filter(|outcome| matches!(outcome, Ok(Err(NotAdmitted::Busy { turn: 1 })))).count();
        assert_eq!((admitted, busy), (1, 19));
        // The database itself would refuse a second one.
        let mut tx = stores[0].database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
        let second = "INSERT INTO turns (session_id, tenant_id, turn, status, message_tokens, created_at, request_id, \
             metadata, message) VALUES ($1, 1, 99, 'running', 0, 0, '', '', '')";
        assert!(tx.sql(second).bind(id).run().await.unwrap_err().as_database_error().unwrap().is_unique_violation());
    }

    async fn what_may_have_been_written_can_be_written_again(database: Database) {
        let store = database.store().await;
        let id = session(&store).await;
        let first = store.admit_turn(&ANYONE, admission(existing(id), 7)).await.unwrap().unwrap();
        let again = store.admit_turn(&ANYONE, admission(existing(id), 7)).await.unwrap().unwrap();
        assert_eq!((first.turn, again.turn), (1, 1));
        let key = TurnKey { tenant: Caller::ANYONE.tenant, session: id, turn: 1, lease_token: 7 };
        let completed = completion("hello");
        for _ in 0..2 {
            let ended = store.end_turn(key, completed.clone(), Duration::ZERO, false, NOW, None).await.unwrap();
            assert_eq!(ended, Ended::Stored);
        }
        let failed = Ending::Failed { code: "UPSTREAM_ERROR".into(), message: "no".into() };
        assert_eq!(store.end_turn(key, failed, Duration::ZERO, false, NOW, None).await.unwrap(), Ended::LeaseLost);
        let stranger = TurnKey { lease_token: 8, ..key };
        assert_eq!(store.end_turn(stranger, completed, Duration::ZERO, false, NOW, None).await.unwrap(), Ended::Gone);
        assert_eq!(store.session(&ANYONE, id).await.unwrap().unwrap().completed_turns, 1);
    }

    async fn activity_never_moves_backwards_though_clocks_do(database: Database) {
        let store = database.store().await;
        let id = session(&store).await;
        let early = Admission { now: NOW - Duration::from_secs(60), ..admission(existing(id), 1) };
        store.admit_turn(&ANYONE, early).await.unwrap().unwrap();
        assert_eq!(store.session(&ANYONE, id).await.unwrap().unwrap().last_activity, NOW);
    }

    async fn a_transaction_that_is_dropped_leaves_nothing_and_blocks_nobody(database: Database) {
        let store = database.store().await;
        for _ in 0..30 {
            let mut tx = store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
            let insert = "INSERT INTO facts (tenant_id, user_id, key, updated_at, value) VALUES (1, 'u', 'k', 0, '1')";
            tx.sql(insert).run().await.unwrap();
        }
        let (count,): (i64,) = store.database().read(atlus::store::db::Reach::Everybody, "SELECT COUNT(*) FROM facts").one().await.unwrap();
        assert_eq!(count, 0);
        session(&store).await;
    }

    async fn a_deletion_that_broke_off_is_finished_later(database: Database) {
        let store = database.store().await;
        let id = session(&store).await;
        let mut tx = store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
        // As left by a server that stopped after the first transaction, with more turns than go at once.
        tx.sql("DELETE FROM sessions").run().await.unwrap();
        tx.sql("INSERT INTO erasures (session_id, tenant_id, created_at) VALUES ($1, 1, 1000)").bind(id).run().await.unwrap();
        for turn in 1..=1200_i64 {
            tx.sql("INSERT INTO turns (session_id, tenant_id, turn, status, message_tokens, created_at, request_id, \
                    metadata, message) VALUES ($1, 1, $2, 'completed', 0, 0, '', '{}', 'secret')")
                .bind(id).bind(turn).run().await.unwrap();
        }
        tx.sql("INSERT INTO facts (tenant_id, user_id, key, session_id, turn, updated_at, value) \
                VALUES (1, 'u', 'k', $1, 3, 0, '1'), (1, 'u', 'k', 0, 0, 0, '2')").bind(id).run().await.unwrap();
        tx.commit().await.unwrap();

        // What is still there is not found any more.
        assert!(store.turn(&ANYONE, id, 1).await.unwrap().is_none());
        let page = store.turns(&ANYONE, id, None, Direction::Asc, None, 10).await.unwrap();
        assert!(page.items.is_empty());

        store.finish_erasures(Timestamp::from_millis(1000), 10).await.unwrap();
        let left = "SELECT (SELECT COUNT(*) FROM turns), (SELECT COUNT(*) FROM facts), (SELECT COUNT(*) FROM erasures)";
        let counts: (i64, i64, i64) = store.database().read(atlus::store::db::Reach::Everybody, left).one().await.unwrap();
        assert_eq!(counts, (1200, 2, 1));
        store.finish_erasures(Timestamp::from_millis(1001), 10).await.unwrap();
        let counts: (i64, i64, i64) = store.database().read(atlus::store::db::Reach::Everybody, left).one().await.unwrap();
        assert_eq!(counts, (0, 1, 0));
    }

    async fn a_session_reopened_while_old_ones_are_removed_stays(database: Database) {
        let store = database.store().await;
        let old = || Session { ended_at: Some(NOW), ..Session::new(UserId::default(), NOW) };
        let (stays, goes) = (old(), old());
        for session in [&stays, &goes] {
            store.insert_session(&ANYONE, session.clone(), None).await.unwrap();
        }
        let cutoffs = Cutoffs { any: NOW + Duration::from_secs(1), temporary: NOW };
        assert_eq!(store.sessions_to_remove(cutoffs, 10).await.unwrap().len(), 2);
        let reopened = SessionPatch { is_active: Some(true), ..SessionPatch::default() };
        store.update_session(&ANYONE, stays.id, reopened, None, NOW).await.unwrap().unwrap();
        for (session, outcome) in [(stays, Deleted::Changed), (goes, Deleted::Gone)] {
            let only_if = Some(OnlyIf::Old(cutoffs));
            let deleted = store.delete_session(&ANYONE, session.id, only_if, NOW).await.unwrap();
            assert_eq!(deleted, outcome);
        }
    }

    async fn a_binary_too_old_for_the_schema_says_so_and_changes_nothing(database: Database) {
        let store = database.store().await;
        let mut tx = store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
        tx.sql("UPDATE schema_info SET minimum_binary = '99.1.0'").run().await.unwrap();
        tx.commit().await.unwrap();
        for refusal in [
            Store::migrate(&database.settings()).await.unwrap_err(),
            Store::connect(&database.settings()).await.err().unwrap(),
        ] {
            assert!(matches!(refusal, ConnectError::TooOld { .. }));
            assert!(refusal.to_string().contains("needs atlus 99.1.0 or newer"), "{refusal}");
        }
    }

    async fn a_binary_that_still_fits_runs_on_a_newer_schema(database: Database) {
        let store = database.store().await;
        let mut tx = store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
        tx.sql("INSERT INTO _sqlx_migrations (version, description, installed_on, success, checksum, execution_time) \
                SELECT 9999, 'of a later release', installed_on, success, checksum, execution_time FROM _sqlx_migrations \
                WHERE version = 1")
            .run().await.unwrap();
        tx.commit().await.unwrap();
        database.run_sql("ALTER TABLE sessions ADD COLUMN added_later TEXT").await;
        Store::migrate(&database.settings()).await.unwrap();
        let other = database.store().await;
        let id = session(&other).await;
        // Also through statements that were prepared before.
        assert!(store.session(&ANYONE, id).await.unwrap().is_some());
    }

    async fn instances_that_start_together_migrate_once(database: Database) {
        let empty = Arc::new(Database::empty(database.kind).await);
        let starts: Vec<_> = (0..6).map(|_| {
            let empty = empty.clone();
            tokio::spawn(async move { Store::migrate(&empty.settings()).await })
        }).collect();
        for start in starts {
            start.await.unwrap().unwrap();
        }
        session(&empty.store().await).await;
    }

    async fn the_databases_clock_is_near_ours(database: Database) {
        let store = database.store().await;
        let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let clock = Duration::from_millis(store.clock().await.unwrap().as_millis().unsigned_abs());
        assert!(clock.abs_diff(before) < Duration::from_secs(30));
    }
}

#[tokio::test]
async fn sqlite_is_set_up_to_survive_a_power_cut_and_to_overwrite_what_is_deleted() {
    let database = Database::on(atlus::store::Kind::Sqlite).await;
    let store = database.store().await;
    let mut tx = store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
    let pragmas = [
        ("PRAGMA journal_mode", "wal"),
        ("PRAGMA synchronous", "2"),
        ("PRAGMA foreign_keys", "1"),
        ("PRAGMA secure_delete", "1"),
        ("PRAGMA auto_vacuum", "2"),
        ("PRAGMA busy_timeout", "5000"),
    ];
    for (pragma, expected) in pragmas {
        let value = match tx.sql(pragma).one::<(i64,)>().await {
            Ok((number,)) => number.to_string(),
            Err(_) => tx.sql(pragma).one::<(String,)>().await.unwrap().0,
        };
        assert_eq!(value, expected, "{pragma}");
    }
}

#[tokio::test]
async fn a_sqlite_file_that_is_up_to_date_is_opened_without_a_write() {
    let database = Database::on(atlus::store::Kind::Sqlite).await;
    Store::migrate(&database.settings()).await.unwrap();
    let store = database.store().await;
    store.ping().await.unwrap();
    let log = format!("{}-wal", database.url.strip_prefix("sqlite://").unwrap());
    assert_eq!(std::fs::metadata(&log).unwrap().len(), 0);
}

#[tokio::test]
async fn a_sqlite_file_is_made_for_its_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let database = Database::on(atlus::store::Kind::Sqlite).await;
    let store = database.store().await;
    session(&store).await;
    for suffix in ["", "-wal", "-shm"] {
        let file = format!("{}{suffix}", database.url.strip_prefix("sqlite://").unwrap());
        let mode = std::fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
}

#[tokio::test]
async fn writes_that_come_together_share_transactions() {
    let database = Database::on(atlus::store::Kind::Postgres).await;
    let store = database.store().await;
    let sessions = (0..200).map(|_| Session::new(UserId::default(), NOW));
    let writes = sessions.map(|session| store.insert_session(&ANYONE, session, None));
    futures_util::future::join_all(writes).await.into_iter().for_each(|outcome| outcome.unwrap());
    // Each row names the transaction that wrote it.
    let transactions = "SELECT COUNT(DISTINCT xmin::text) FROM sessions";
    let (transactions,): (i64,) =
        store.database().read(atlus::store::db::Reach::Everybody, transactions).one().await.unwrap();
    assert!(transactions < 50, "{transactions} transactions for 200 writes");
}

#[tokio::test]
async fn writes_share_no_more_transactions_than_the_setting_lets_them() {
    let database = Database::on(atlus::store::Kind::Postgres).await;
    let mut settings = database.settings();
    settings.write_batch = 1;
    let store = Store::connect(&settings).await.unwrap();
    let sessions = (0..50).map(|_| Session::new(UserId::default(), NOW));
    let writes = sessions.map(|session| store.insert_session(&ANYONE, session, None));
    futures_util::future::join_all(writes).await.into_iter().for_each(|outcome| outcome.unwrap());
    let transactions = "SELECT COUNT(DISTINCT xmin::text) FROM sessions";
    let (transactions,): (i64,) =
        store.database().read(atlus::store::db::Reach::Everybody, transactions).one().await.unwrap();
    assert_eq!(transactions, 50);
}

#[tokio::test]
async fn postgres_plans_statements_once_and_by_their_indexes() {
    let database = Database::on(atlus::store::Kind::Postgres).await;
    let mut settings = database.settings();
    // A pooler takes no settings.
    settings.url = database.direct.parse().unwrap();
    let store = Store::connect(&settings).await.unwrap();
    for (setting, expected) in
        [("SHOW plan_cache_mode", "force_generic_plan"), ("SHOW enable_seqscan", "off"), ("SHOW jit", "off")]
    {
        let shown = store.database().read(atlus::store::db::Reach::Everybody, setting);
        assert_eq!(shown.one::<(String,)>().await.unwrap().0, expected, "{setting}");
    }
}

#[tokio::test]
async fn sqlite_is_built_to_plan_no_statement_again() {
    let database = Database::on(atlus::store::Kind::Sqlite).await;
    let store = database.store().await;
    let options = store.database().read(atlus::store::db::Reach::Everybody, "PRAGMA compile_options");
    let options: Vec<(String,)> = options.all().await.unwrap();
    let has = |name: &str| options.iter().any(|(option,)| option == name);
    assert!(
        has("ENABLE_QPSG") && has("DEFAULT_MEMSTATUS=0") && !has("ENABLE_MEMORY_MANAGEMENT"),
        "{options:?}"
    );
}

#[tokio::test]
async fn tls_is_as_the_url_says() {
    let authority =
        std::env::var("ATLUS_TEST_POSTGRES_CA").expect("scripts/test names a certificate authority");
    let database = Database::on(atlus::store::Kind::Postgres).await;
    let connect = async |parameters: &str| {
        let mut settings = database.settings();
        settings.url = format!("{}?{parameters}", database.direct).parse().unwrap();
        let store = Store::connect(&settings).await?;
        let encrypted = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        let (encrypted,): (bool,) =
            store.database().read(atlus::store::db::Reach::Everybody, encrypted).one().await.unwrap();
        Ok::<_, ConnectError>(encrypted)
    };
    assert!(!connect("sslmode=disable").await.unwrap());
    assert!(connect("sslmode=require").await.unwrap());
    assert!(connect(&format!("sslmode=verify-full&sslrootcert={authority}")).await.unwrap());
    // The certificate is signed by nobody that is known to the system.
    assert!(matches!(connect("sslmode=verify-full").await, Err(ConnectError::Unreachable { .. })));
}

#[tokio::test]
async fn a_statement_that_takes_too_long_is_given_up() {
    let database = Database::on(atlus::store::Kind::Postgres).await;
    let mut settings = database.settings();
    settings.statement_timeout = Duration::from_millis(100);
    let store = Store::connect(&settings).await.unwrap();
    let slow = store
        .database()
        .read(atlus::store::db::Reach::Everybody, "SELECT 1::BIGINT FROM pg_sleep(30)")
        .one::<(i64,)>()
        .await;
    assert!(matches!(store::Error::from(slow.unwrap_err()), store::Error::Unavailable(_)));
    store.ping().await.unwrap();
}
