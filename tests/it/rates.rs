//! The rate limit below the HTTP surface: what instances make of a window that they share.

use std::{sync::Arc, time::Duration};

use atlus::{
    auth::rate::{Class, Client, Limiter, RateLimit, Taken},
    jobs,
    store::{Kind, Share, Store},
};
use futures_util::future::join_all;
use tokio::time::sleep;

use crate::harness::{Database, Server, on_both};

const MINUTE: Duration = Duration::from_secs(60);
const LIMIT: RateLimit = RateLimit { requests: 100, window: MINUTE };

async fn call(limiter: &Limiter) -> Taken {
    limiter.take(Class::Default, Client::Key(1)).await
}

/// How many of `calls` calls pass, each made when the one before has been answered.
async fn passed(limiter: &Limiter, calls: usize) -> usize {
    let mut passed = 0;
    for _ in 0..calls {
        passed += usize::from(call(limiter).await.allowed);
    }
    passed
}

/// How many of `calls` calls pass, all made at once and spread over the instances.
async fn passed_at_once(instances: &[Arc<Limiter>], calls: usize) -> usize {
    let calls = instances.iter().cycle().take(calls).map(|limiter| {
        let limiter = Arc::clone(limiter);
        tokio::spawn(async move { call(&limiter).await.allowed })
    });
    join_all(calls).await.into_iter().filter(|allowed| *allowed.as_ref().unwrap()).count()
}

/// Instances of a server on one Postgres database.
async fn instances<const N: usize>(database: &Database) -> [Arc<Limiter>; N] {
    let limiters =
        join_all((0..N).map(async |_| Arc::new(Limiter::new(LIMIT, &database.store().await)))).await;
    limiters.try_into().unwrap_or_else(|_| panic!("as many as were made"))
}

async fn run_sql(store: &Store, sql: &'static str) {
    let mut tx = store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
    tx.sql(sql).run().await.unwrap();
    tx.commit().await.unwrap();
}

async fn number(store: &Store, sql: &'static str) -> i64 {
    let (number,) = store.database().read(atlus::store::db::Reach::Everybody, sql).one().await.unwrap();
    number
}

on_both! {
    async fn of_calls_made_at_once_the_limit_passes(database: Database) {
        let limiter = Arc::new(Limiter::new(LIMIT, &database.store().await));
        assert_eq!(passed_at_once(&[limiter], 300).await, 100);
    }

    async fn a_call_is_told_how_many_are_left(database: Database) {
        let limiter = Limiter::new(LIMIT, &database.store().await);
        for left in (0..100).rev() {
            let taken = call(&limiter).await;
            assert_eq!((taken.allowed, taken.remaining), (true, left));
            assert!(taken.resets_in <= MINUTE);
        }
        let refused = call(&limiter).await;
        assert_eq!((refused.allowed, refused.remaining), (false, 0));
    }

    async fn a_window_that_ends_is_followed_by_a_whole_one(database: Database) {
        let limit = RateLimit { requests: 3, window: Duration::from_secs(1) };
        let limiter = Limiter::new(limit, &database.store().await);
        while call(&limiter).await.allowed {}
        let mut taken = call(&limiter).await;
        while !taken.allowed {
            assert!(taken.resets_in <= limit.window);
            sleep(taken.resets_in).await;
            taken = call(&limiter).await;
        }
        assert_eq!(taken.remaining, 2);
    }

    async fn shares_are_of_one_window_until_it_ends(database: Database) {
        let store = database.store().await;
        for (got, rest) in [(10, 15), (10, 5), (5, 0), (0, 0)] {
            let share = store.take_share(7, 10, 25, MINUTE).await.unwrap();
            assert_eq!((share.got, share.rest), (got, rest));
            assert!(share.ends_in > Duration::ZERO && share.ends_in <= MINUTE);
        }
        let another = store.take_share(8, 10, 25, MINUTE).await.unwrap();
        assert_eq!((another.got, another.rest), (10, 15));
    }

    async fn a_window_whose_time_is_over_begins_anew(database: Database) {
        let (store, short) = (database.store().await, Duration::from_millis(1));
        let take = async || store.take_share(7, 3, 5, short).await.unwrap();
        take().await;
        // Within the first there is less.
        while !matches!(take().await, Share { got: 3, rest: 2, .. }) {}
    }

    async fn windows_that_are_over_are_removed_and_others_stay(server: Server) {
        let store = &server.app.store;
        for _ in 0..2 {
            store.take_share(1, 1, 2, MINUTE).await.unwrap();
        }
        let over = "WITH RECURSIVE n (i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < 1200) \
                    INSERT INTO rate_windows (bucket, ends_at, taken) SELECT i, i, 1 FROM n";
        run_sql(store, over).await;
        jobs::rates::remove_ended_windows(&server.app).await.unwrap();
        assert_eq!(number(store, "SELECT COUNT(*) FROM rate_windows").await, 1);
        assert_eq!(store.take_share(1, 1, 2, MINUTE).await.unwrap().got, 0);
    }
}

#[tokio::test]
async fn instances_that_are_called_by_turns_let_the_limit_pass() {
    let database = Database::on(Kind::Postgres).await;
    let [first, second] = instances(&database).await;
    let mut both = 0;
    for _ in 0..150 {
        both += passed(&first, 1).await + passed(&second, 1).await;
    }
    assert_eq!(both, 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_that_are_called_at_once_let_the_limit_pass() {
    let database = Database::on(Kind::Postgres).await;
    assert_eq!(passed_at_once(&instances::<2>(&database).await, 300).await, 100);
}

#[tokio::test]
async fn an_instance_that_is_called_no_more_keeps_a_tenth_of_the_limit_at_most() {
    let database = Database::on(Kind::Postgres).await;
    let [idle, busy] = instances(&database).await;
    assert_eq!(passed(&idle, 1).await, 1);
    assert_eq!(passed(&busy, 300).await, 90);
    assert_eq!(passed(&idle, 300).await, 9);
}

#[tokio::test]
async fn a_window_that_is_used_up_costs_the_database_nothing() {
    let database = Database::on(Kind::Postgres).await;
    let store = database.store().await;
    let limiter = Limiter::new(LIMIT, &store);
    assert_eq!(passed(&limiter, 101).await, 100);
    run_sql(&store, "DELETE FROM rate_windows").await;
    assert_eq!(passed(&limiter, 100).await, 0);
    assert_eq!(number(&store, "SELECT COUNT(*) FROM rate_windows").await, 0);
}

#[tokio::test]
async fn a_window_that_begins_anew_while_it_is_removed_stays() {
    let database = Database::on(Kind::Postgres).await;
    let store = database.store().await;
    run_sql(&store, "INSERT INTO rate_windows (bucket, ends_at, taken) VALUES (1, 0, 1)").await;
    let mut tx = store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
    tx.sql("UPDATE rate_windows SET ends_at = 4000000000000").run().await.unwrap();
    let removal = tokio::spawn({
        let store = store.clone();
        async move { store.remove_ended_windows(10).await.unwrap() }
    });
    let waiting = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    while number(&store, waiting).await == 0 {}
    tx.commit().await.unwrap();
    assert_eq!(removal.await.unwrap(), 0);
}

#[tokio::test]
async fn without_the_database_an_instance_counts_for_itself_until_it_is_back() {
    let database = Database::on(Kind::Postgres).await;
    let store = database.store().await;
    let limiter = Limiter::new(LIMIT, &store);
    assert_eq!(passed(&limiter, 30).await, 30);
    run_sql(&store, "ALTER TABLE rate_windows RENAME TO away").await;
    assert_eq!(passed(&limiter, 300).await, 70);
    run_sql(&store, "ALTER TABLE away RENAME TO rate_windows").await;
    run_sql(&store, "DELETE FROM rate_windows").await;
    let mut clients = 2..;
    while number(&store, "SELECT COUNT(*) FROM rate_windows").await == 0 {
        limiter.take(Class::Default, Client::Key(clients.next().unwrap())).await;
        sleep(Duration::from_millis(20)).await;
    }
}
