//! What container engines ask of the binary, and what a service manager hears from it.

use std::{sync::Arc, time::Duration};

use tempfile::TempDir;
use tokio::{net::UnixDatagram, sync::Semaphore, time::timeout};

use serde_json::json;

use crate::{
    harness::{Database, Process, atlus, on_both},
    models::{Script, Upstream},
};

/// Runs the doctor on a server, with a database in the settings that cannot be opened: exit code and what is said.
async fn ask(probe: &str, listen: &str) -> (i32, String) {
    let variables = [("ATLUS_LISTEN", listen), ("ATLUS_DATABASE_URL", "sqlite:///absent/atlus.db")];
    let ended = timeout(Duration::from_secs(60), atlus(&["doctor", probe], &variables).output());
    let ended = ended.await.unwrap().unwrap();
    let said = String::from_utf8([ended.stdout, ended.stderr].concat()).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    (ended.status.code().unwrap(), said)
}

/// A service manager's socket.
struct Manager {
    socket: UnixDatagram,
    folder: TempDir,
}

impl Manager {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        Self { socket, folder }
    }

    fn path(&self) -> String {
        self.folder.path().join("notify").display().to_string()
    }

    /// What comes next.
    async fn heard(&self) -> String {
        let mut news = [0; 4096];
        let length = timeout(Duration::from_secs(60), self.socket.recv(&mut news)).await.unwrap().unwrap();
        String::from_utf8_lossy(&news[..length]).into_owned()
    }

    /// What comes next but signs of life.
    async fn told(&self) -> String {
        loop {
            let news = self.heard().await;
            if news != "WATCHDOG=1\n" {
                return news;
            }
        }
    }
}

on_both! {
    async fn a_probe_tells_life_from_readiness(database: Database) {
        let server = Process::start(&database, &[]).await;
        let listen = server.base.strip_prefix("http://").unwrap().to_owned();
        assert_eq!(ask("--live", &listen).await, (0, format!("http://{listen}/livez answered 200 OK\n")));
        assert_eq!(ask("--ready", &listen).await, (0, format!("http://{listen}/readyz answered 200 OK\n")));

        // Servers in containers listen everywhere.
        let everywhere = format!("0.0.0.0:{}", listen.rsplit_once(':').unwrap().1);
        assert_eq!(ask("--live", &everywhere).await.0, 0);

        database.run_sql("ALTER TABLE schema_info RENAME TO schema_lost").await;
        assert_eq!(ask("--live", &listen).await.0, 0);
        let (code, said) = ask("--ready", &listen).await;
        assert!(code == 1 && said.contains("/readyz answered 5"), "{code} {said}");

        server.kill().await;
        let (code, said) = ask("--live", &listen).await;
        assert!(code == 1 && said.starts_with(&format!("atlus: no server answers at http://{listen}/livez")), "{said}");
    }

    async fn the_service_manager_hears_of_every_change(database: Database) {
        let (manager, gate) = (Manager::new(), Arc::new(Semaphore::new(0)));
        let upstream = Upstream::gated(|_| Script::Say("worth waiting for".into()), gate.clone()).await;
        let (socket, model) = (manager.path(), upstream.url.as_str());
        let variables =
            [("NOTIFY_SOCKET", socket.as_str()), ("ATLUS_MODEL_URL", model), ("ATLUS_MODEL", "scripted")];
        let mut server = Process::spawn(&database, &variables);
        let ready = manager.heard().await;
        server.listening().await;
        assert_eq!(ready, format!("READY=1\nSTATUS=listening on {}\n", server.base));

        let chat = tokio::spawn({
            let client = server.client.clone();
            async move { client.post("/chat", json!({"message": "hi"})).await.status }
        });
        upstream.asked_times(1).await;
        server.signal("-TERM");
        assert_eq!(manager.heard().await, "STOPPING=1\nSTATUS=stopping: finishing what is under way\n");
        gate.add_permits(1);
        assert_eq!(chat.await.unwrap(), 200);
        assert!(server.child.wait().await.unwrap().success());
    }

    async fn nobody_hears_of_a_server_before_its_database_is_migrated(database: Database) {
        let (manager, empty) = (Manager::new(), Database::empty(database.kind).await);
        let socket = manager.path();
        let _server = Process::spawn(&empty, &[("NOTIFY_SOCKET", &socket)]);
        assert!(manager.heard().await.starts_with("READY=1\n"));
        empty.run_sql("SELECT minimum_binary FROM schema_info").await;
    }

    async fn signs_of_life_are_shown_where_they_are_asked_for_until_the_end(database: Database) {
        let (manager, gate) = (Manager::new(), Arc::new(Semaphore::new(0)));
        let upstream = Upstream::gated(|_| Script::Say("worth waiting for".into()), gate.clone()).await;
        let (socket, model) = (manager.path(), upstream.url.as_str());
        let variables = [
            ("NOTIFY_SOCKET", socket.as_str()), ("WATCHDOG_USEC", "300000"), ("ATLUS_MODEL_URL", model),
            ("ATLUS_MODEL", "scripted"),
        ];
        let mut server = Process::spawn(&database, &variables);
        assert!(manager.told().await.starts_with("READY=1\n"));
        server.listening().await;
        for _ in 0..3 {
            assert_eq!(manager.heard().await, "WATCHDOG=1\n");
        }
        // Not because its database answers: to be killed would not bring that back.
        database.run_sql("ALTER TABLE schema_info RENAME TO schema_lost").await;
        for _ in 0..3 {
            assert_eq!(manager.heard().await, "WATCHDOG=1\n");
        }

        let chat = tokio::spawn({
            let client = server.client.clone();
            async move { client.post("/chat", json!({"message": "hi"})).await.status }
        });
        upstream.asked_times(1).await;
        server.signal("-TERM");
        assert!(manager.told().await.starts_with("STOPPING=1\n"));
        for _ in 0..3 {
            assert_eq!(manager.heard().await, "WATCHDOG=1\n");
        }
        gate.add_permits(1);
        assert_eq!(chat.await.unwrap(), 200);
        assert!(server.child.wait().await.unwrap().success());
    }
}
