//! The client against the servers that `clients/tests/world.py` has started.

use std::{collections::HashSet, env, process::Command};

use atlus_client_example::{
    Client, Error, Event, connect, events, pages,
    types::{ChatAnswer, ChatRequestModel, ErrorCode, NewSessionUserId},
};
use futures_util::TryStreamExt;
use serde_json::Value;

const NOBODY: &str = "session_0000000000000000";

fn world() -> Value {
    serde_json::from_str(&env::var("ATLUS_TEST_WORLD").unwrap()).unwrap()
}

fn url(server: &str) -> String {
    world()["servers"][server].as_str().unwrap().to_owned()
}

fn key(server: &str) -> Option<String> {
    (server == "keyed").then(|| world()["key"].as_str().unwrap().to_owned())
}

fn to(server: &str) -> Client {
    connect(Some(&url(server)), key(server).as_deref()).unwrap()
}

async fn new_session(client: &Client) -> String {
    client.create_session().send().await.unwrap().data.session_id.to_string()
}

async fn say(client: &Client, session: &str, message: &str) -> Result<ChatAnswer, Error> {
    let chat = client.chat().body_map(|body| body.session_id(session.to_owned()).message(message));
    Ok(chat.send().await?.into_inner().data)
}

/// What a message to a new session brings, asked of `model`.
async fn hear(client: &Client, message: &str, model: &str) -> Result<Vec<(i64, Event)>, Error> {
    let session = new_session(client).await;
    let model = model.parse::<ChatRequestModel>()?;
    let chat = client.chat_stream().body_map(|body| body.session_id(session).message(message).model(model));
    events(chat.send().await?.into_inner()).try_collect().await
}

fn text(events: &[(i64, Event)]) -> String {
    let text = |(_, event): &(i64, Event)| match event {
        Event::Delta(delta) => Some(delta.text.clone()),
        _ => None,
    };
    events.iter().filter_map(text).collect()
}

async fn conversation(server: &str) {
    let client = to(server);
    let id = new_session(&client).await;
    assert!(say(&client, &id, "Hello, ATLUS!").await.unwrap().response.starts_with("Hello!"));
    assert!(say(&client, &id, "Hi, my name is John").await.unwrap().response.contains("John"));
    assert!(say(&client, &id, "What's my name?").await.unwrap().response.contains("Your name is John"));
    let recap = say(&client, &id, "What did I just say?").await.unwrap();
    assert!(recap.response.contains("What's my name?"));
    assert_eq!(recap.turn.get(), 4);
    let session = client.get_session().session_id(id.as_str()).send().await.unwrap().into_inner().data;
    assert_eq!(session.memory.conversation_turns, 4);
    assert!(session.forked_from.is_none());

    let deleted = client.delete_session().session_id(id.as_str()).send().await.unwrap();
    assert_eq!(deleted.message, "Session deleted successfully");
    let gone = client.get_session().session_id(id.as_str()).send().await.map_err(Error::from);
    assert_eq!(gone.unwrap_err().code(), Some(ErrorCode::SessionNotFound));
    let invalid = say(&client, &id, "Anybody there?").await;
    assert_eq!(invalid.unwrap_err().code(), Some(ErrorCode::InvalidSession));
}

#[tokio::test]
async fn a_conversation_from_creation_to_deletion() {
    conversation("open").await;
}

#[tokio::test]
async fn a_conversation_with_a_key() {
    conversation("keyed").await;
}

#[tokio::test]
async fn pages_list_every_session_once() {
    let client = &to("open");
    let user = format!("user_{}", std::process::id());
    let mut made = HashSet::new();
    for _ in 0..45 {
        let user: NewSessionUserId = user.parse().unwrap();
        let created = client.create_session().body_map(|body| body.user_id(user)).send().await.unwrap();
        made.insert(created.data.session_id.to_string());
    }
    let listed: Vec<String> = pages(async |cursor| {
        let listing = client.list_sessions().user_id(user.as_str()).limit(10);
        let listing = match cursor {
            Some(cursor) => listing.cursor(cursor),
            None => listing,
        };
        let page = listing.send().await?.into_inner().data;
        Ok((page.items, page.next_cursor))
    })
    .map_ok(|session| session.session_id.to_string())
    .try_collect()
    .await
    .unwrap();
    assert_eq!(listed.len(), 45);
    assert_eq!(listed.into_iter().collect::<HashSet<_>>(), made);
}

#[tokio::test]
async fn a_stream_tells_start_pieces_and_answer() {
    let heard = hear(&to("open"), "Hi, my name is John", "any").await.unwrap();
    assert!(matches!(&heard[0].1, Event::Start(start) if start.turn.get() == 1));
    assert_eq!(text(&heard), "Hello! Nice to meet you, John.");
    let Some((_, Event::Done(answer))) = heard.last() else { panic!("{heard:?}") };
    assert_eq!(answer.response, text(&heard));
}

#[tokio::test]
async fn a_stream_that_is_left_goes_on_elsewhere() {
    let client = to("modelled");
    let session = new_session(&client).await;
    let model = "slow".parse::<ChatRequestModel>().unwrap();
    let chat =
        client.chat_stream().body_map(|body| body.session_id(session.clone()).message("Hello").model(model));
    let mut stream = Box::pin(events(chat.send().await.unwrap().into_inner()));
    let mut heard = Vec::new();
    while heard.len() < 5 {
        heard.push(stream.try_next().await.unwrap().unwrap());
    }
    drop(stream);
    let last = u64::try_from(heard[4].0).unwrap();
    let rest = to("modelled")
        .stream_turn()
        .session_id(session.as_str())
        .turn(1)
        .last_event_id(last)
        .send()
        .await
        .unwrap();
    heard.extend(events(rest.into_inner()).try_collect::<Vec<_>>().await.unwrap());
    assert_eq!(text(&heard), world()["slow_text"].as_str().unwrap());
    assert!(matches!(heard.last(), Some((_, Event::Done(_)))));
}

#[tokio::test]
async fn failures_are_typed_errors() {
    let open = &to("open");
    let codes = [
        (open.list_sessions().cursor("made-up").send().await.err(), ErrorCode::InvalidCursor),
        (
            connect(Some(&url("keyed")), None).unwrap().list_sessions().send().await.err(),
            ErrorCode::Unauthorized,
        ),
    ];
    for (error, code) in codes {
        assert_eq!(Error::from(error.unwrap()).code(), Some(code));
    }
    let failed = [
        (say(open, "nonsense", "Hi").await.map(drop), ErrorCode::InvalidSession),
        (say(open, NOBODY, &"x".repeat(32_001)).await.map(drop), ErrorCode::InvalidSession),
        (hear(&to("modelled"), "Hello", "broken").await.map(drop), ErrorCode::UpstreamError),
        (hear(&to("modelled"), "Hello", "silent").await.map(drop), ErrorCode::UpstreamTimeout),
    ];
    for (outcome, code) in failed {
        assert_eq!(outcome.unwrap_err().code(), Some(code));
    }
}

#[tokio::test]
async fn a_failure_says_when_to_try_again() {
    let client = to("limited");
    // One call is within the limit.
    drop(client.list_sessions().send().await);
    let refused = client.list_sessions().send().await.map_err(Error::from).unwrap_err();
    assert_eq!(refused.code(), Some(ErrorCode::RateLimitExceeded));
    assert!(matches!(refused, Error::Told { retry_after: Some(_), .. }));
}

#[test]
fn the_example_runs() {
    let example = env!("CARGO_BIN_EXE_atlus-client-example");
    let ran =
        Command::new(example).env("ATLUS_SERVER", url("open")).env_remove("ATLUS_API_KEY").output().unwrap();
    let said = String::from_utf8(ran.stdout).unwrap();
    assert!(ran.status.success(), "{said}");
    for line in ["Your name is John.", "4 turns, 4 counted", "It is gone."] {
        assert!(said.contains(line), "{said}");
    }
}
