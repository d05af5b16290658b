//! What operators and browsers ask of a server.

use reqwest::header;
use serde_json::{Value, json};

use crate::{
    harness::{Answer, Server, on_both},
    schema::DOCUMENT,
};

async fn at(server: &Server, path: &str) -> Answer {
    server.send(server.http.get(format!("{}{path}", server.base))).await
}

on_both! {
    async fn health_tells_database_and_model(server: Server) {
        let health = server.get("/health").await;
        assert_eq!(health.status, 200);
        let kind = server.app.store.kind().as_str();
        assert_eq!(health.body, json!({
            "status": "healthy", "service": "atlus-api", "version": env!("CARGO_PKG_VERSION"),
            "timestamp": "2024-01-01T12:00:00.000Z", "database": {"kind": kind, "status": "ok"},
            "model": {"provider": "builtin", "name": "builtin"}
        }));
    }

    async fn probes_answer(server: Server) {
        assert_eq!(at(&server, "/livez").await.status, 200);
        assert_eq!(at(&server, "/readyz").await.status, 200);
    }

    async fn the_service_card_says_where_to_go(server: Server) {
        let card = at(&server, "/").await;
        for place in ["docs", "openapi", "health"] {
            let answer = server.http.get(format!("{}{}", server.base, card.data()[place].as_str().unwrap()));
            assert_eq!(answer.send().await.unwrap().status(), 200, "{place}");
        }
    }

    async fn the_document_is_served_in_both_forms(server: Server) {
        let json = at(&server, "/openapi.json").await;
        assert_eq!(json.body, *DOCUMENT);
        let yaml = at(&server, "/openapi.yaml").await;
        let from_yaml: Value = serde_yaml::from_str(yaml.body.as_str().unwrap()).unwrap();
        assert_eq!(from_yaml, *DOCUMENT);
    }

    async fn swagger_ui_needs_no_network(server: Server) {
        let moved = server.get("/docs").await;
        assert_eq!((moved.status, moved.headers["location"].to_str().unwrap()), (308, "/docs"));
        let docs = at(&server, "/docs").await;
        assert_eq!(docs.status, 200);
        let page = docs.body.as_str().unwrap();
        assert!(page.contains("SwaggerUIBundle") && page.contains("\"operationId\":\"createSession\""));
        assert!(page.contains("tryItOutEnabled: true"));
        for outside in ["src=\"http", "href=\"http", "@import"] {
            assert!(!page.contains(outside), "{outside}");
        }
        // Browsers are told to fetch nothing from elsewhere, and to ask again only whether it has changed.
        let policy = docs.headers["content-security-policy"].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'") && !policy.contains("http"), "{policy}");
        let again = server.http.get(format!("{}/docs", server.base)).header(header::IF_NONE_MATCH, &docs.headers["etag"]);
        assert_eq!(again.send().await.unwrap().status(), 304);
    }
}
