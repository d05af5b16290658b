//! The conversation: which session it is in, and what is done for each line.

use anyhow::Context;
use chrono::{DateTime, Local};
use futures_util::future::join_all;
use tokio::signal::{
    ctrl_c,
    unix::{Signal, SignalKind, signal},
};

use super::{
    client::{Client, Failure, Reason, Session, Turn},
    line::{HELP, Line},
    reply::{Heard, Reply},
    terminal::{Entry, Terminal, one_line},
};

/// Turns that are shown of a session when it is opened.
const RECENT: usize = 6;
/// Sessions that are listed at once.
const LISTED: usize = 10;
/// The most items that a server puts on a page.
const PAGE: usize = 100;
/// How much of a message stands for a title, in characters.
const TITLE: usize = 40;

/// Which session to begin with.
pub enum First {
    New,
    Session(String),
    /// The user's newest that is active.
    Newest,
}

pub struct Conversation {
    client: Client,
    terminal: Terminal,
    user: String,
    /// Absent until the first message, so that who comes and goes leaves nothing behind.
    session: Option<Session>,
    /// The title of the session to be made.
    title: Option<String>,
    /// The ids of the sessions that have been listed: who says 2 means the second.
    listed: Vec<String>,
    /// Where the list goes on.
    more: Option<String>,
    /// Whether the last message failed, or anything since.
    failed: bool,
}

impl Conversation {
    pub fn new(client: Client, terminal: Terminal, user: String) -> Self {
        let (session, title, listed, more) = (None, None, Vec::new(), None);
        Self { client, terminal, user, session, title, listed, more, failed: false }
    }

    /// Holds it to its end; whether it ended well.
    pub async fn hold(mut self, place: &str, first: First) -> anyhow::Result<bool> {
        self.begin(place, first).await?;
        let mut warned = false;
        loop {
            let line = match self.terminal.line().await? {
                Entry::Line(line) => line,
                Entry::End => break,
                Entry::Interrupted if !self.terminal.interactive => return Ok(false),
                Entry::Interrupted if warned => break,
                Entry::Interrupted => {
                    warned = true;
                    self.terminal.hint("Ctrl-C once more ends the conversation, as Ctrl-D and /quit do")?;
                    continue;
                }
            };
            warned = false;
            let line = Line::read(&line);
            if line == Line::Quit {
                break;
            }
            let message = matches!(line, Line::Message(_));
            let failure = match self.follow(line).await {
                Ok(()) => {
                    self.failed &= !message;
                    continue;
                }
                Err(error) => error.downcast::<Failure>()?,
            };
            self.failed = true;
            if let Failure::GivenUp(what) = failure {
                self.terminal.interrupted();
                self.terminal.notice(&what)?;
                if !self.terminal.interactive {
                    break;
                }
            } else {
                self.terminal.failure(&failure.to_string())?;
            }
        }
        Ok(self.terminal.interactive || !self.failed)
    }

    async fn begin(&mut self, place: &str, first: First) -> anyhow::Result<()> {
        let health = self.client.health().await.with_context(|| format!("no ATLUS at {place}"))?;
        let (version, model) = (health.version, health.model.name);
        self.terminal.hint(&format!(
            "ATLUS {version} at {place}, model {model}. /help lists the commands, Ctrl-D ends."
        ))?;
        match first {
            First::New => Ok(()),
            First::Session(id) => self.open(&id).await,
            First::Newest => match self.client.newest(&self.user).await {
                Ok(session) => self.open(&session.id).await,
                Err(failure) if failure.is("NO_SESSION_FOUND") => {
                    self.terminal.notice("No session to continue; the first message begins one")?;
                    Ok(())
                }
                Err(failure) => Err(failure.into()),
            },
        }
    }

    /// Does what a line asks for.
    async fn follow(&mut self, line: Line<'_>) -> anyhow::Result<()> {
        if let Line::Message(text) = line {
            return self.say(text).await;
        }
        tokio::select! {
            done = self.obey(line) => done,
            _ = ctrl_c() => Err(Failure::GivenUp("Given up".to_owned()).into()),
        }
    }

    async fn obey(&mut self, command: Line<'_>) -> anyhow::Result<()> {
        match command {
            Line::Nothing | Line::Message(_) | Line::Quit => Ok(()),
            Line::Wrong(problem) => Err(Failure::Other(problem).into()),
            Line::Help => Ok(self.terminal.print(HELP)?),
            Line::Sessions => {
                self.listed.clear();
                self.list(None).await
            }
            Line::MoreSessions => {
                let more = self.more.clone();
                let more =
                    more.ok_or_else(|| Failure::other("That is all; /sessions lists from the newest"))?;
                self.list(Some(&more)).await
            }
            Line::Switch(to) => {
                let id = match to.parse::<usize>() {
                    Ok(number) => self.listed.get(number.wrapping_sub(1)).cloned().ok_or_else(|| {
                        Failure::Other(format!("No session has the number {number}; /sessions numbers them"))
                    })?,
                    Err(_) => to.to_owned(),
                };
                self.open(&id).await
            }
            Line::New(title) => {
                (self.session, self.title) = (None, title.map(str::to_owned));
                Ok(self.terminal.hint("The next message begins a new session")?)
            }
            Line::Title(text) => {
                match &mut self.session {
                    Some(session) => *session = self.client.rename(&session.id, text).await?,
                    None => self.title = Some(text.to_owned()),
                }
                Ok(self.terminal.hint(&format!("The title is now: {text}"))?)
            }
            Line::History(count) => self.history(count).await,
            Line::Info => self.info().await,
        }
    }

    /// Makes a session the present one, and shows where it stands.
    async fn open(&mut self, id: &str) -> anyhow::Result<()> {
        let session = self.client.session(id).await?;
        let title = session.title.as_ref().map(|title| format!(": {}", one_line(title))).unwrap_or_default();
        self.terminal.hint(&format!("Session {}{title}", session.id))?;
        if !session.is_active {
            self.terminal.notice("It is not active any more: it can be read, and that is all")?;
        }
        if self.terminal.interactive {
            let page = self.client.turns(&session.id, "desc", RECENT, None).await?;
            if page.next_cursor.is_some() {
                self.terminal.remark("… (/history shows more)")?;
            }
            self.show(&page.items)?;
        }
        self.user.clone_from(&session.user);
        (self.session, self.title) = (Some(session), None);
        Ok(())
    }

    /// Says something and hears the answer.
    async fn say(&mut self, message: &str) -> anyhow::Result<()> {
        let mut interrupts = signal(SignalKind::interrupt())?;
        let mut reply = tokio::select! {
            reply = self.send(message) => reply?,
            _ = interrupts.recv() => return Err(left().into()),
        };
        loop {
            let heard = tokio::select! {
                heard = reply.next() => heard?,
                _ = interrupts.recv() => {
                    self.cancel(&reply, &mut interrupts).await?;
                    continue;
                }
            };
            match heard {
                Heard::Begun => {}
                Heard::Text(text) => self.terminal.piece(&text)?,
                Heard::Done => return Ok(self.terminal.end_line()?),
            }
        }
    }

    /// Sends a message to the present session, which is made if there is none.
    async fn send(&mut self, message: &str) -> anyhow::Result<Reply> {
        let session = match self.session.take() {
            Some(session) => session,
            None => {
                let session = self.client.create(&self.user, self.title.as_deref()).await?;
                self.title = None;
                self.terminal.hint(&format!("Session {}", session.id))?;
                session
            }
        };
        let session = self.session.insert(session);
        Ok(self.client.say(&session.id, message).await?)
    }

    /// Cancels the turn that is heard; goes on hearing it if it has just ended.
    async fn cancel(&self, reply: &Reply, interrupts: &mut Signal) -> Result<(), Failure> {
        let (Some(session), Some(turn)) = (&self.session, reply.turn()) else { return Err(left()) };
        let cancelled = tokio::select! {
            cancelled = self.client.cancel(&session.id, turn) => cancelled,
            _ = interrupts.recv() => return Err(left()),
        };
        match cancelled {
            Ok(()) => Err(Failure::GivenUp("Cancelled".to_owned())),
            Err(failure) if failure.is("TURN_NOT_RUNNING") => Ok(()),
            Err(failure) => Err(Failure::Other(format!("Not cancelled: {failure}"))),
        }
    }

    /// Lists the user's sessions, a page of them.
    async fn list(&mut self, cursor: Option<&str>) -> anyhow::Result<()> {
        let page = self.client.sessions(&self.user, LISTED, cursor).await?;
        if page.items.is_empty() {
            self.terminal.notice(&format!("{} has no sessions", self.user))?;
        }
        let names = join_all(page.items.iter().map(|session| self.name(session))).await;
        for (session, name) in page.items.into_iter().zip(names) {
            let (id, when) = (&session.id, local_time(&session.last_activity));
            let state = if session.is_active { "active" } else { "inactive" };
            let number = self.listed.len() + 1;
            self.terminal.print(&format!("{number:>3}  {id}  {when}  {state:<8}  {name}"))?;
            self.listed.push(session.id);
        }
        self.more = page.next_cursor;
        if self.more.is_some() {
            self.terminal.hint("… (/sessions more)")?;
        }
        Ok(())
    }

    /// What a session is called: its title, or the first words that were said in it.
    async fn name(&self, session: &Session) -> String {
        if let Some(title) = &session.title {
            return one_line(title);
        }
        // A list without a name in it is better than no list.
        let first = self.client.turns(&session.id, "asc", 1, None).await.ok();
        let Some(turn) = first.and_then(|page| page.items.into_iter().next()) else { return String::new() };
        let words = one_line(&turn.message);
        match words.char_indices().nth(TITLE) {
            Some((end, _)) => format!("{}…", &words[..end]),
            None => words,
        }
    }

    /// Shows the last turns.
    async fn history(&mut self, count: usize) -> anyhow::Result<()> {
        let Some(session) = &self.session else { return Err(no_session().into()) };
        let (mut turns, mut cursor) = (Vec::new(), None);
        while turns.len() < count {
            let limit = PAGE.min(count - turns.len());
            let page = self.client.turns(&session.id, "desc", limit, cursor.as_deref()).await?;
            turns.extend(page.items);
            cursor = page.next_cursor;
            if cursor.is_none() {
                break;
            }
        }
        self.show(&turns)
    }

    /// Shows turns that are given from the last to the first.
    fn show(&mut self, turns: &[Turn]) -> anyhow::Result<()> {
        for turn in turns.iter().rev() {
            self.terminal.quote(&turn.message)?;
            match (&turn.response, &turn.error) {
                (Some(response), _) => self.terminal.print(response)?,
                (None, Some(Reason { code, message })) => {
                    self.terminal.remark(&format!("({}: {message}, {code})", turn.status))?;
                }
                (None, None) => self.terminal.remark(&format!("({})", turn.status))?,
            }
        }
        Ok(())
    }

    async fn info(&mut self) -> anyhow::Result<()> {
        if let Some(session) = &self.session {
            let session = self.client.session(&session.id).await?;
            self.terminal.print(&format!("session  {}", session.id))?;
            if let Some(title) = &session.title {
                self.terminal.print(&format!("title    {}", one_line(title)))?;
            }
            let state = if session.is_active { "active" } else { "inactive" };
            self.terminal.print(&format!("state    {state}"))?;
            let turns = session.memory.as_ref().map_or(0, |memory| memory.turns);
            self.terminal.print(&format!("turns    {turns}"))?;
            self.session = Some(session);
        } else {
            self.terminal.notice(&no_session().to_string())?;
        }
        let model = self.client.health().await?.model;
        self.terminal.print(&format!("user     {}", self.user))?;
        Ok(self.terminal.print(&format!("model    {} ({})", model.name, model.provider))?)
    }
}

fn no_session() -> Failure {
    Failure::other("There is no session yet; the first message makes one")
}

fn left() -> Failure {
    Failure::GivenUp("Left; the message may still be answered: see /history".to_owned())
}

/// A moment as the clock on the wall shows it.
fn local_time(text: &str) -> String {
    let time = DateTime::parse_from_rfc3339(text);
    time.map_or_else(
        |_| one_line(text),
        |time| time.with_timezone(&Local).format("%Y-%m-%d %H:%M").to_string(),
    )
}
