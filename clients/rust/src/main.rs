//! A conversation from its beginning to its end, with the server that `ATLUS_SERVER` names.

use std::io::{self, Write};

use atlus_client_example::{
    Client, Error, Event, connect, events, pages,
    types::{ErrorCode, Turn},
};
use futures_util::{Stream, TryStreamExt};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let client = &connect(None, None)?;
    let session = client.create_session().send().await?.into_inner().data;
    let id = session.session_id.as_str();

    for message in ["Hello, ATLUS!", "Hi, my name is John", "What's my name?", "What did I just say?"] {
        println!("> {message}");
        hear(client, id, message).await?;
    }

    let turns: Vec<Turn> = turns(client, id).try_collect().await?;
    let session = client.get_session().session_id(id).send().await?.into_inner().data;
    println!("{} turns, {} counted", turns.len(), session.memory.conversation_turns);

    println!("{}", client.delete_session().session_id(id).send().await?.message);
    match client.get_session().session_id(id).send().await.map_err(Error::from) {
        Err(error) if error.code() == Some(ErrorCode::SessionNotFound) => println!("It is gone."),
        Err(error) => return Err(error),
        Ok(_) => println!("It is still there!"),
    }
    Ok(())
}

/// Sends a message and prints the answer while it comes.
async fn hear(client: &Client, session: &str, message: &str) -> Result<(), Error> {
    let chat = client.chat_stream().body_map(|body| body.session_id(session.to_owned()).message(message));
    let mut heard = Box::pin(events(chat.send().await?.into_inner()));
    while let Some((_, event)) = heard.try_next().await? {
        match event {
            Event::Start(_) => {}
            Event::Delta(delta) => print!("{}", delta.text),
            Event::Done(_) => println!(),
        }
        io::stdout().flush().map_err(|error| Error::Other(error.into()))?;
    }
    Ok(())
}

/// All turns of a session, two to a page.
fn turns(client: &Client, session: &str) -> impl Stream<Item = Result<Turn, Error>> {
    pages(async move |cursor| {
        let listing = client.list_turns().session_id(session).limit(2);
        let listing = match cursor {
            Some(cursor) => listing.cursor(cursor),
            None => listing,
        };
        let page = listing.send().await?.into_inner().data;
        Ok((page.items, page.next_cursor))
    })
}
