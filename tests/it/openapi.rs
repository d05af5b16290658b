//! The document is what the code prints, and is whole.

use std::collections::BTreeSet;

use atlus::{api::document, store::Kind};
use reqwest::header::CONTENT_TYPE;
use serde_json::Value;

use crate::{
    harness::Server,
    schema::{DOCUMENT, STRICT, operations, problems, resolved, validator},
};

#[test]
fn the_checked_in_document_is_what_the_code_prints() {
    let checked_in = std::fs::read_to_string("openapi.yaml").unwrap();
    assert!(
        checked_in == document::text(document::Format::Yaml),
        "openapi.yaml is out of date: run `cargo run -- openapi > openapi.yaml`"
    );
}

#[test]
fn both_forms_say_the_same() {
    let yaml: Value = serde_yaml::from_str(&document::text(document::Format::Yaml)).unwrap();
    assert_eq!(yaml, *DOCUMENT);
}

/// Every part of the document with its place, such as `/paths/~1livez/get`.
fn walk(part: &Value, place: &str, visit: &mut impl FnMut(&str, &Value)) {
    visit(place, part);
    match part {
        Value::Object(map) => map.iter().for_each(|(key, inner)| {
            walk(inner, &format!("{place}/{}", key.replace('~', "~0").replace('/', "~1")), visit);
        }),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, inner)| walk(inner, &format!("{place}/{i}"), visit));
        }
        _ => {}
    }
}

fn is_described(part: &Value) -> bool {
    part["description"].as_str().is_some_and(|text| !text.trim().is_empty())
}

#[test]
fn every_operation_is_named_and_described() {
    let tags: Vec<_> = DOCUMENT["tags"].as_array().unwrap().iter().map(|tag| &tag["name"]).collect();
    let mut names = BTreeSet::new();
    for (method, path, operation) in operations() {
        let name = operation["operationId"].as_str().unwrap_or_else(|| panic!("{method} {path} has no id"));
        assert!(names.insert(name.to_owned()), "{name} twice");
        assert!(operation["summary"].is_string() && is_described(&operation), "{name}");
        let own = operation["tags"].as_array().unwrap();
        assert!(own.len() == 1 && tags.contains(&&own[0]), "{name}");
        assert!(operation["requestBody"].is_null() || is_described(&operation["requestBody"]), "{name}");
        for response in operation["responses"].as_object().unwrap().values() {
            assert!(is_described(resolved(response)), "{name}");
        }
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            assert!(is_described(parameter), "{name}: {}", parameter["name"]);
            assert!(!parameter["name"].as_str().unwrap().starts_with("param"), "{name}");
        }
    }
}

#[test]
fn every_schema_and_field_is_described() {
    let mut fields = 0;
    for (name, schema) in DOCUMENT["components"]["schemas"].as_object().unwrap() {
        assert!(is_described(schema), "{name}");
        walk(schema, name, &mut |place, part| {
            for (field, schema) in part["properties"].as_object().into_iter().flatten() {
                fields += 1;
                assert!(is_described(schema), "{place}: {field}");
            }
        });
    }
    assert!(fields > 100);
}

#[test]
fn every_reference_leads_somewhere() {
    walk(&DOCUMENT, "", &mut |place, part| {
        if let Some(target) = part.get("$ref") {
            let pointer = target.as_str().unwrap().strip_prefix('#').unwrap();
            assert!(DOCUMENT.pointer(pointer).is_some(), "{place}: {target}");
        }
    });
}

#[test]
fn every_example_fits_its_schema() {
    let mut examples = 0;
    let mut check = |place: &str, schema: &Value, example: &Value| {
        examples += 1;
        let problems = problems(&validator(schema), example);
        assert!(problems.is_empty(), "{place}: {problems:#?} in {example:#}");
    };
    walk(&STRICT, "", &mut |place, part| {
        let schema = part.get("schema").unwrap_or(part);
        if let Some(example) = part.get("example") {
            check(place, schema, example);
        }
        // Those of the components have no schema of their own, but belong to failures.
        for example in part["examples"].as_object().into_iter().flatten().map(|(_, example)| example) {
            let failure = &STRICT["components"]["schemas"]["Failure"];
            check(place, part.get("schema").unwrap_or(failure), &resolved(example)["value"]);
        }
    });
    assert!(examples > 200, "{examples}");
}

#[test]
fn every_body_and_every_parameter_has_an_example() {
    let has_example = |content: &Value| {
        ["example", "examples"].iter().any(|key| content.get(key).is_some())
            || content["schema"].get("example").is_some()
    };
    for (_, _, operation) in operations() {
        let name = &operation["operationId"];
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            assert!(has_example(parameter), "{name}: {}", parameter["name"]);
        }
        let bodies = [&operation["requestBody"]];
        let answers = operation["responses"].as_object().unwrap().iter();
        let answers =
            answers.filter(|(status, _)| !status.ends_with("XX")).map(|(_, answer)| resolved(answer));
        for body in bodies.into_iter().chain(answers) {
            let contents = body["content"].as_object().into_iter().flatten();
            contents.for_each(|(_, content)| assert!(has_example(content), "{name}: {body}"));
        }
    }
}

#[test]
fn every_failure_of_an_operation_is_shown_under_its_status() {
    let mut shown = BTreeSet::new();
    for (_, _, operation) in operations() {
        let name = operation["operationId"].as_str().unwrap();
        let responses = operation["responses"].as_object().unwrap();
        // Client generators take one type of failure, and it has its own.
        if name == "getHealth" {
            continue;
        }
        for range in ["4XX", "5XX"] {
            let schema = &resolved(&responses[range])["content"]["application/json"]["schema"];
            assert_eq!(schema["$ref"], "#/components/schemas/Failure", "{name}");
        }
        for (status, response) in responses {
            let Some(status) = status.parse::<u16>().ok().filter(|status| *status >= 400) else { continue };
            let content = &resolved(response)["content"]["application/json"];
            assert_eq!(content["schema"]["$ref"], "#/components/schemas/Failure", "{name} {status}");
            for (code, example) in content["examples"].as_object().unwrap() {
                let error = &resolved(example)["value"]["error"];
                assert_eq!(
                    (&error["status"], &error["code"]),
                    (&status.into(), &code.as_str().into()),
                    "{name}"
                );
                shown.insert(code.clone());
            }
        }
    }
    // It is what no operation answers.
    shown.insert("METHOD_NOT_ALLOWED".to_owned());
    let codes = DOCUMENT["components"]["schemas"]["ErrorCode"]["enum"].as_array().unwrap();
    let codes = codes.iter().map(|code| code.as_str().unwrap().to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(shown, codes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_example_of_a_request_is_done_by_a_server() {
    let server = Server::on(Kind::Sqlite).await;
    let mut sent = 0;
    for (method, path, operation) in operations() {
        for (media_type, content) in operation["requestBody"]["content"].as_object().into_iter().flatten() {
            let named = content["examples"].as_object().into_iter().flatten();
            let bodies = named.map(|(_, example)| example["value"].to_string());
            let text = content["schema"]["example"].as_str().map(str::to_owned);
            for body in bodies.chain(text) {
                let session = server.session(serde_json::json!({"user_id": "user_123"})).await;
                server.say(&session, "Hi, my name is John").await;
                let body = body.replace("session_a1b2c3d4e5f67890", &session);
                let url = path.replace("{session_id}", &session).replace("{user_id}", "user_123");
                let request = server.request(method.clone(), url.trim_start_matches("/api/v1"));
                let request = request.header(CONTENT_TYPE, media_type).body(body.clone());
                let status = match path.ends_with("/stream") {
                    true => u16::from(!server.listen(request).await.all().await.is_empty()) * 200,
                    false => server.send(request).await.status,
                };
                assert!((200..300).contains(&status), "{path} answered {status} to {body}");
                sent += 1;
            }
        }
    }
    assert!(sent > 15, "{sent}");
}
