//! What would break clients: the document is compared with that of the last release, `tests/released/openapi.yaml`.
//! A break passes if the newest section of CHANGELOG.md has a line that begins with `- **Breaking**` and names the
//! operation or the schema in backticks.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::schema::DOCUMENT;

/// What a client of the release may trip over, and the name of the operation or schema where it is.
#[derive(Debug, PartialEq, Eq)]
struct Break {
    name: String,
    what: String,
}

/// Who writes what a schema describes. What clients send must go on being taken, so it may only be widened; what they
/// are answered must go on being understood, so it may only be narrowed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Writer {
    Client,
    Server,
}

struct Comparison<'a> {
    old: &'a Value,
    new: &'a Value,
    /// Named schemas that were compared already.
    seen: BTreeSet<(String, Writer)>,
    breaks: Vec<Break>,
}

fn breaks(old: &Value, new: &Value) -> Vec<Break> {
    let mut comparison = Comparison { old, new, seen: BTreeSet::new(), breaks: Vec::new() };
    for (path, item) in entries(&old["paths"]) {
        for (method, operation) in entries(item) {
            let (now, name) = (&new["paths"][path][method], operation["operationId"].as_str().unwrap());
            if now["operationId"] != name {
                comparison.note(name, &format!("{method} {path} is gone or has another name"));
                continue;
            }
            comparison.compare(name, (&taken(operation), &taken(now)), "takes", Writer::Client);
            comparison.compare(name, (&answered(operation), &answered(now)), "answers", Writer::Server);
        }
    }
    let failure = json!({"$ref": "#/components/schemas/Failure"});
    comparison.compare("Failure", (&failure, &failure), "", Writer::Server);
    comparison.breaks
}

/// What an operation takes, as one schema.
fn taken(operation: &Value) -> Value {
    let (mut fields, mut required) = (Map::new(), Vec::new());
    let mut add = |name: &str, schema: Value, part: &Value| {
        fields.insert(name.to_owned(), schema);
        required.extend((part["required"] == true).then(|| name.to_owned()));
    };
    for parameter in items(&operation["parameters"]) {
        let name = format!("{}:{}", parameter["in"], parameter["name"]).replace('"', "");
        add(&name, parameter["schema"].clone(), parameter);
    }
    let body = &operation["requestBody"];
    if body.is_object() {
        add("body", json!({"properties": schemas(&body["content"])}), body);
    }
    json!({"properties": fields, "required": required})
}

/// What an operation answers if all is well, as one schema.
fn answered(operation: &Value) -> Value {
    let done = entries(&operation["responses"]).filter(|(status, _)| status.starts_with('2'));
    let mut fields = Map::from_iter([("status".to_owned(), json!({"enum": []}))]);
    for (status, response) in done {
        fields["status"]["enum"].as_array_mut().unwrap().push(status.as_str().into());
        let mut parts = schemas(&response["content"]);
        parts.extend(entries(&response["headers"]).map(|(name, header)| (name.clone(), header.clone())));
        fields.insert(status.clone(), json!({"properties": parts}));
    }
    json!({"properties": fields})
}

fn schemas(content: &Value) -> Map<String, Value> {
    entries(content).map(|(media_type, content)| (media_type.clone(), content["schema"].clone())).collect()
}

impl Comparison<'_> {
    fn note(&mut self, name: &str, what: &str) {
        self.breaks.push(Break { name: name.to_owned(), what: what.to_owned() });
    }

    /// Compares two schemas; those with a name of their own once, and by it.
    fn compare(&mut self, name: &str, (old, new): (&Value, &Value), place: &str, writer: Writer) {
        let ((old, named), (new, _)) = (resolved(self.old, old), resolved(self.new, new));
        let name = named.unwrap_or(name);
        if named.is_some() && !self.seen.insert((name.to_owned(), writer)) {
            return;
        }
        let narrowed = match writer {
            Writer::Client => narrower(old, new),
            Writer::Server => narrower(new, old),
        };
        // Clients are told to expect codes that they do not know.
        for what in narrowed.iter().filter(|_| (name, writer) != ("ErrorCode", Writer::Server)) {
            self.note(name, &format!("{place}: another {what}"));
        }
        for (field, schema) in entries(&old["properties"]) {
            let place = format!("{place} {field}");
            match &new["properties"][field] {
                Value::Null => self.note(name, &format!("{place}: gone")),
                now => self.compare(name, (schema, now), &place, writer),
            }
        }
        for part in ["items", "additionalProperties"].into_iter().filter(|part| old[part].is_object()) {
            self.compare(name, (&old[part], &new[part]), place, writer);
        }
        for parts in ["oneOf", "anyOf"] {
            let pairs = items(&old[parts]).zip(items(&new[parts]));
            pairs.for_each(|pair| self.compare(name, pair, place, writer));
        }
    }
}

/// By what the second schema refuses something that the first allows.
fn narrower(wide: &Value, narrow: &Value) -> Vec<String> {
    let mut by = Vec::new();
    for key in ["type", "format", "pattern"] {
        by.extend((!narrow[key].is_null() && narrow[key] != wide[key]).then(|| key.to_owned()));
    }
    for (key, infinity) in [
        ("minimum", f64::NEG_INFINITY),
        ("minLength", 0.0),
        ("minItems", 0.0),
        ("maximum", f64::INFINITY),
        ("maxLength", f64::INFINITY),
        ("maxItems", f64::INFINITY),
    ] {
        let [wide, narrow] = [wide, narrow].map(|schema| schema[key].as_f64().unwrap_or(infinity));
        let is_narrower = if key.starts_with("min") { narrow > wide } else { narrow < wide };
        by.extend(is_narrower.then(|| key.to_owned()));
    }
    by.extend((wide["nullable"] == true && narrow["nullable"] != true).then(|| "nullable".to_owned()));
    let has = |list: &Value, item: &Value| items(list).any(|other| other == item);
    let fewer = wide["enum"].is_null() || items(&wide["enum"]).any(|choice| !has(&narrow["enum"], choice));
    by.extend((narrow["enum"].is_array() && fewer).then(|| "enum".to_owned()));
    let required = items(&narrow["required"]).filter(|field| !has(&wide["required"], field));
    by.extend(required.map(|field| format!("required {field}")));
    for parts in ["oneOf", "anyOf"] {
        by.extend((items(&narrow[parts]).count() < items(&wide[parts]).count()).then(|| parts.to_owned()));
    }
    by
}

/// What a reference leads to, and its name; anything else itself.
fn resolved<'a>(document: &'a Value, part: &'a Value) -> (&'a Value, Option<&'a str>) {
    // One with a description stands in an `allOf`.
    let Some(target) = part["$ref"].as_str().or_else(|| part["allOf"][0]["$ref"].as_str()) else {
        return (part, None);
    };
    (document.pointer(target.trim_start_matches('#')).unwrap(), target.rsplit('/').next())
}

fn entries(part: &Value) -> impl Iterator<Item = (&String, &Value)> {
    part.as_object().into_iter().flatten()
}

fn items(part: &Value) -> impl Iterator<Item = &Value> {
    part.as_array().into_iter().flatten()
}

/// Those that the newest section of a changelog does not name.
fn untold(breaks: Vec<Break>, changelog: &str) -> Vec<Break> {
    let newest = changelog.split("\n## ").nth(1).unwrap_or_default();
    let told: Vec<_> = newest.lines().filter(|line| line.starts_with("- **Breaking**")).collect();
    let is_told = |it: &Break| told.iter().any(|line| line.contains(&format!("`{}`", it.name)));
    breaks.into_iter().filter(|it| !is_told(it)).collect()
}

#[test]
fn clients_of_the_last_release_are_not_broken_unless_the_changelog_says_so() {
    let released = std::fs::read_to_string("tests/released/openapi.yaml").unwrap();
    let released = serde_yaml::from_str(&released).unwrap();
    let untold = untold(breaks(&released, &DOCUMENT), &std::fs::read_to_string("CHANGELOG.md").unwrap());
    assert!(untold.is_empty(), "say so in CHANGELOG.md, or do not break clients: {untold:#?}");
}

/// A small document, as it is and with the part at a place changed.
fn changed(place: &str, to: &Value) -> [Value; 2] {
    let old = json!({
        "paths": {"/pets": {"post": {
            "operationId": "createPet",
            "parameters": [
                {"name": "size", "in": "query", "required": false, "schema": {"type": "integer", "maximum": 9}},
            ],
            "requestBody": {"required": false, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/NewPet"}}}},
            "responses": {
                "201": {
                    "headers": {"ETag": {"schema": {"type": "string"}}},
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Pet"}}},
                },
                "4XX": {"$ref": "#/components/responses/ClientError"},
            },
        }}},
        "components": {"schemas": {
            "NewPet": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string", "minLength": 1, "maxLength": 20, "nullable": true},
                    "kind": {"type": "string", "enum": ["cat", "dog"]},
                },
            },
            "Pet": {
                "type": "object",
                "required": ["name", "owner"],
                "properties": {
                    "name": {"type": "string", "maxLength": 20},
                    "kind": {"type": "string", "enum": ["cat", "dog"]},
                    "owner": {"allOf": [{"$ref": "#/components/schemas/Owner"}]},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
            },
            "Owner": {"type": "object", "required": ["id"], "properties": {"id": {"type": "integer", "minimum": 1}}},
            "Failure": {"type": "object", "required": ["code"], "properties": {"code": {"$ref": "#/components/schemas/ErrorCode"}}},
            "ErrorCode": {"type": "string", "enum": ["NOT_FOUND"]},
        }},
    });
    let mut new = old.clone();
    let (parent, key) = place.rsplit_once('/').unwrap();
    let key = key.replace("~1", "/");
    let parent = new.pointer_mut(parent).unwrap();
    match (parent, to) {
        (Value::Object(map), Value::Null) => drop(map.remove(&key)),
        (Value::Array(items), _) if key == "-" => items.push(to.clone()),
        (Value::Array(items), Value::Null) => drop(items.remove(key.parse().unwrap())),
        (parent, to) => parent[&key] = to.clone(),
    }
    [old, new]
}

const PET: &str = "/paths/~1pets/post";
const SCHEMAS: &str = "/components/schemas";

#[test]
fn each_kind_of_break_is_found_where_it_is() {
    let needed = json!({"name": "age", "in": "query", "required": true, "schema": {"type": "integer"}});
    for (place, to, name) in [
        (PET.to_owned(), Value::Null, "createPet"),
        (format!("{PET}/operationId"), json!("addPet"), "createPet"),
        (format!("{PET}/parameters/0"), Value::Null, "createPet"),
        (format!("{PET}/parameters/0/schema/maximum"), json!(8), "createPet"),
        (format!("{PET}/parameters/0/schema/type"), json!("string"), "createPet"),
        (format!("{PET}/parameters/0/required"), json!(true), "createPet"),
        (format!("{PET}/parameters/-"), needed, "createPet"),
        (format!("{PET}/requestBody/required"), json!(true), "createPet"),
        (format!("{PET}/requestBody/content/application~1json"), Value::Null, "createPet"),
        (format!("{PET}/responses/201/content/application~1json"), Value::Null, "createPet"),
        (format!("{PET}/responses/201/headers/ETag"), Value::Null, "createPet"),
        (format!("{PET}/responses/202"), json!({}), "createPet"),
        (format!("{PET}/responses"), json!({"200": {}}), "createPet"),
        (format!("{SCHEMAS}/NewPet/required/-"), json!("kind"), "NewPet"),
        (format!("{SCHEMAS}/NewPet/properties/kind"), Value::Null, "NewPet"),
        (format!("{SCHEMAS}/NewPet/properties/kind/enum/0"), Value::Null, "NewPet"),
        (format!("{SCHEMAS}/NewPet/properties/name/nullable"), Value::Null, "NewPet"),
        (format!("{SCHEMAS}/NewPet/properties/name/minLength"), json!(2), "NewPet"),
        (format!("{SCHEMAS}/NewPet/properties/name/pattern"), json!("^a"), "NewPet"),
        (format!("{SCHEMAS}/Pet/required/0"), Value::Null, "Pet"),
        (format!("{SCHEMAS}/Pet/properties/name"), Value::Null, "Pet"),
        (format!("{SCHEMAS}/Pet/properties/name/maxLength"), json!(21), "Pet"),
        (format!("{SCHEMAS}/Pet/properties/name/nullable"), json!(true), "Pet"),
        (format!("{SCHEMAS}/Pet/properties/kind/enum/-"), json!("bird"), "Pet"),
        (format!("{SCHEMAS}/Pet/properties/tags/items/type"), json!("integer"), "Pet"),
        (format!("{SCHEMAS}/Owner/properties/id/minimum"), Value::Null, "Owner"),
        (format!("{SCHEMAS}/Failure/properties/code"), Value::Null, "Failure"),
    ] {
        let [old, new] = changed(&place, &to);
        let found = breaks(&old, &new);
        assert!(!found.is_empty(), "{place}");
        assert!(found.iter().all(|it| it.name == name), "{place}: {found:?}");
        let told = format!("# Changelog\n\n## 2\n\n- **Breaking**: `{name}` is new.\n\n## 1\n");
        assert_eq!(untold(found, &told), [], "{place}");
    }
}

#[test]
fn what_is_added_breaks_nobody() {
    let optional = json!({"name": "age", "in": "query", "required": false, "schema": {"type": "integer"}});
    for (place, to) in [
        (
            "/paths/~1owners".to_owned(),
            json!({"get": {"operationId": "listOwners", "responses": {"200": {}}}}),
        ),
        (format!("{PET}/summary"), json!("Make a pet")),
        (format!("{PET}/parameters/-"), optional),
        (format!("{PET}/parameters/0/schema/maximum"), json!(10)),
        (format!("{PET}/responses/409"), json!({})),
        (format!("{PET}/responses/201/headers/Age"), json!({"schema": {"type": "integer"}})),
        (format!("{PET}/requestBody/content/text~1csv"), json!({"schema": {"type": "string"}})),
        (format!("{SCHEMAS}/NewPet/properties/age"), json!({"type": "integer"})),
        (format!("{SCHEMAS}/NewPet/properties/kind/enum/-"), json!("bird")),
        (format!("{SCHEMAS}/NewPet/properties/name/maxLength"), Value::Null),
        (format!("{SCHEMAS}/NewPet/required/0"), Value::Null),
        (format!("{SCHEMAS}/Pet/properties/age"), json!({"type": "integer"})),
        (format!("{SCHEMAS}/Pet/properties/name/maxLength"), json!(19)),
        (format!("{SCHEMAS}/Pet/required/-"), json!("kind")),
        (format!("{SCHEMAS}/ErrorCode/enum/-"), json!("TOO_MANY")),
    ] {
        let [old, new] = changed(&place, &to);
        assert_eq!(breaks(&old, &new), [], "{place}");
    }
}

#[test]
fn only_the_newest_section_lets_a_break_pass_and_only_by_its_name() {
    let broken = || vec![Break { name: "Pet".to_owned(), what: String::new() }];
    for changelog in [
        "# Changelog\n\n## 2\n\n- Added\n\n## 1\n\n- **Breaking**: `Pet` is new.\n",
        "# Changelog\n\n## 2\n\n- **Breaking**: `NewPet` is new.\n",
        "# Changelog\n\n## 2\n\n- `Pet` is new.\n",
        "",
    ] {
        assert_eq!(untold(broken(), changelog), broken(), "{changelog}");
    }
}
