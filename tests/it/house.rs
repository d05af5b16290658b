//! The rules of the house that a test can hold.

use std::{
    fs,
    path::{Path, PathBuf},
};

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Every source file: its path below `src`, and its text.
fn house() -> Vec<(String, String)> {
    let mut found = Vec::new();
    sources(Path::new("src"), &mut found);
    assert!(found.len() > 30);
    let read = |path: PathBuf| {
        (path.strip_prefix("src").unwrap().display().to_string(), fs::read_to_string(&path).unwrap())
    };
    found.into_iter().map(read).collect()
}

/// Asserts that a word occurs only in these rooms.
fn only_in(word: &str, rooms: &[&str]) {
    for (path, text) in house() {
        if !rooms.iter().any(|room| path.starts_with(room)) {
            assert!(!text.contains(word), "{word} in {path}, but it belongs in {rooms:?}");
        }
    }
}

#[test]
fn the_database_is_known_to_the_store_alone() {
    only_in("sqlx::Sqlite", &["store/"]);
    only_in("sqlx::query", &["store/"]);
    only_in("use sqlx", &["store/"]);
    for word in ["\"SELECT ", "\"INSERT ", "\"UPDATE ", "\"DELETE "] {
        only_in(word, &["store/"]);
    }
}

#[test]
fn http_is_known_to_the_outer_rooms_alone() {
    for word in ["poem::", "use poem", "poem_openapi"] {
        only_in(word, &["api/", "middleware/", "server.rs"]);
    }
    for word in ["prometheus::", "opentelemetry::"] {
        only_in(word, &["telemetry/"]);
    }
    only_in("reqwest", &["auth/", "model/", "cli/", "telemetry/", "config.rs"]);
}

#[test]
fn rooms_use_those_below_them_only() {
    let below = [
        (
            "domain/",
            &[
                "store", "auth", "model", "chat", "jobs", "api", "middleware", "server", "app", "cli",
                "config",
            ][..],
        ),
        (
            "telemetry/",
            &[
                "domain", "store", "auth", "model", "chat", "jobs", "api", "middleware", "server", "app",
                "cli", "config",
            ],
        ),
        ("store/", &["auth", "model", "chat", "jobs", "api", "middleware", "server", "app", "cli", "config"]),
        ("model/", &["store", "auth", "chat", "jobs", "api", "middleware", "server", "app", "cli", "config"]),
        ("auth/", &["chat", "jobs", "api", "middleware", "server", "app", "cli", "config"]),
        ("chat/", &["auth", "jobs", "api", "middleware", "server", "app", "cli", "config"]),
        ("jobs/", &["auth", "api", "middleware", "server", "cli", "config"]),
        ("api/", &["jobs", "middleware", "server", "cli", "config"]),
        ("middleware/", &["jobs", "server", "cli", "config", "store"]),
    ];
    for (path, text) in house() {
        for (room, above) in below {
            for above in above.iter().filter(|_| path.starts_with(room)) {
                for form in [format!("crate::{above}::"), format!("\n    {above}::")] {
                    assert!(!text.contains(&form), "{path} uses {above}");
                }
            }
        }
    }
}

#[test]
fn migrations_are_pairs() {
    let names = |folder: &str| {
        let files = fs::read_dir(Path::new("migrations").join(folder)).unwrap();
        let mut names: Vec<_> = files.map(|file| file.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names("sqlite"), names("postgres"));
}

#[test]
fn every_test_that_security_md_names_is_there() {
    let text = fs::read_to_string("SECURITY.md").unwrap();
    let named =
        text.split('`').skip(1).step_by(2).filter(|name| name.contains("::") && !name.contains("atlus::"));
    let mut count = 0;
    for name in named {
        let (module, test) = name.split_once("::").unwrap();
        let source = fs::read_to_string(format!("tests/it/{module}.rs")).unwrap_or_default();
        assert!(source.contains(&format!("fn {test}(")), "{name} is not there");
        count += 1;
    }
    assert!(count > 30);
}
