//! An archive: sessions, their turns, and what is known about users, as lines of JSON (NDJSON).
//!
//! The first line says what it is. Each session's line is followed by those of its turns and by a digest of all of
//! these; facts come after the sessions; the last line has a digest of everything between it and the first. So what
//! was cut short or changed on its way is found, and each session can be taken in as soon as it is whole.
//!
//! No line is longer than [`MAX_LINE`]: a long text goes before its turn in pieces. There is one [`Writer`] and one
//! [`Reader`], neither of which does any I/O.

use std::{io, mem};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    clock::Timestamp,
    ids::{RequestId, SessionId},
    json::{self, MAX_DEPTH, Metadata, TWICE, Unread, is_deeper, read_value},
    memory::{MAX_FACT_KEY, MAX_FACT_VALUE, ProfileTurns, WorkingMemory},
    session::{Session, SystemPrompt, Title, TtlSeconds, UserId},
    text::{check, refuse_nul, refuse_nul_in},
    turn::{Turn, TurnStatus, Usage},
};

/// The longest line in bytes, its end included.
pub const MAX_LINE: usize = 1 << 20;
/// The most bytes of JSON that a text takes in one line, so that two of them fit beside the rest of their turn.
const PIECE: usize = 256 << 10;
/// The longest text in bytes that is collected from pieces.
const MAX_TEXT: usize = 16 << 20;
const FORMAT: &str = "atlus";
const VERSION: u64 = 1;

/// What an archive is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Of {
    Session,
    User,
    Tenant,
}

/// A session and its memory, without its turns.
#[derive(Clone, Debug)]
pub struct ArchivedSession {
    pub session: Session,
    pub memory: Memory,
}

/// What a session remembers beside its turns.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow, Serialize, Deserialize)]
pub struct Memory {
    #[sqlx(try_from = "String")]
    pub working_memory: WorkingMemory,
    #[sqlx(flatten)]
    pub behavior_profile: Profile,
    #[sqlx(flatten)]
    pub profile_turns: ProfileTurns,
    pub summary: Option<String>,
    /// The last turn that the summary covers.
    pub summary_through: Option<i64>,
    pub updated_at: Timestamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::FromRow, Serialize, Deserialize)]
pub struct Profile {
    pub verbosity: Verbosity,
    pub tone: Tone,
    pub depth: Depth,
}

macro_rules! levels {
    ($($name:ident: $($level:ident)*),*) => {$(
        #[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::Type, Serialize, Deserialize)]
        #[sqlx(type_name = "TEXT", rename_all = "lowercase")]
        #[serde(rename_all = "lowercase")]
        pub enum $name { $($level),* }
    )*};
}
levels!(Verbosity: Low Medium High, Tone: Casual Neutral Technical, Depth: Shallow Normal Advanced);

impl ProfileTurns {
    fn each(&mut self) -> [&mut Option<i64>; 3] {
        [&mut self.verbosity, &mut self.tone, &mut self.depth]
    }
}

/// Something that is known about a user, and the turn that it was learnt from, if it was not stated through the API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArchivedFact {
    pub user_id: UserId,
    pub key: String,
    pub value: Value,
    pub session_id: Option<SessionId>,
    pub turn: Option<i64>,
    pub updated_at: Timestamp,
}

/// How much an archive holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub sessions: i64,
    pub turns: i64,
    pub facts: i64,
}

/// A line. Written in this form, read by its `type`; unknown fields are ignored, unknown types refused.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line {
    Archive(Header),
    Session(Box<SessionLine>),
    Piece(Piece),
    Turn(Box<TurnLine>),
    SessionEnd(SessionEnd),
    Fact(ArchivedFact),
    End(End),
}

#[derive(Serialize, Deserialize)]
struct Header {
    format: String,
    version: u64,
    of: Of,
    exported_at: Timestamp,
    /// The release that wrote it.
    atlus: String,
}

#[derive(Serialize, Deserialize)]
struct SessionLine {
    session_id: SessionId,
    user_id: UserId,
    title: Option<Title>,
    metadata: Metadata,
    system_prompt: Option<SystemPrompt>,
    created_at: Timestamp,
    last_activity: Timestamp,
    ttl_seconds: Option<TtlSeconds>,
    ended_at: Option<Timestamp>,
    temporary: bool,
    forked_from: Option<ForkedFrom>,
    conversation_turns: i64,
    memory: Memory,
}

#[derive(Serialize, Deserialize)]
struct ForkedFrom {
    session_id: SessionId,
    turn: i64,
}

/// A piece of a text that is too long for its turn's line, which follows.
#[derive(Serialize, Deserialize)]
struct Piece {
    field: Field,
    text: Text,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Field {
    Message,
    Response,
}

#[derive(Serialize, Deserialize)]
struct TurnLine {
    turn: i64,
    status: TurnStatus,
    /// Null where it came in pieces.
    message: Option<Text>,
    response: Option<Text>,
    error: Option<TurnError>,
    model: Option<Text>,
    usage: Option<Usage>,
    execution_us: Option<i64>,
    request_id: RequestId,
    metadata: Metadata,
    created_at: Timestamp,
    completed_at: Option<Timestamp>,
}

#[derive(Serialize, Deserialize)]
struct TurnError {
    code: Text,
    message: Text,
}

#[derive(Serialize, Deserialize)]
struct SessionEnd {
    session_id: SessionId,
    turns: i64,
    /// Of the session's line and those of its turns.
    digest: String,
}

#[derive(Serialize, Deserialize)]
struct End {
    #[serde(flatten)]
    counts: Counts,
    /// Of every line between the first and this one.
    digest: String,
}

/// Any text without U+0000.
#[derive(Serialize, Deserialize)]
#[serde(try_from = "String")]
struct Text(String);

impl TryFrom<String> for Text {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        refuse_nul(&text).map(|()| Self(text))
    }
}

impl From<&ArchivedSession> for SessionLine {
    fn from(ArchivedSession { session, memory }: &ArchivedSession) -> Self {
        let session = session.clone();
        let forked_from = session.forked_from_session.zip(session.forked_from_turn);
        Self {
            session_id: session.id,
            user_id: session.user_id,
            title: session.title,
            metadata: session.metadata,
            system_prompt: session.system_prompt,
            created_at: session.created_at,
            last_activity: session.last_activity,
            ttl_seconds: session.ttl_seconds,
            ended_at: session.ended_at,
            temporary: session.temporary,
            forked_from: forked_from.map(|(session_id, turn)| ForkedFrom { session_id, turn }),
            conversation_turns: session.completed_turns,
            memory: memory.clone(),
        }
    }
}

impl From<SessionLine> for ArchivedSession {
    fn from(line: SessionLine) -> Self {
        let session = Session {
            id: line.session_id,
            title: line.title,
            metadata: line.metadata,
            system_prompt: line.system_prompt,
            temporary: line.temporary,
            last_activity: line.last_activity,
            ended_at: line.ended_at,
            completed_turns: line.conversation_turns,
            forked_from_session: line.forked_from.as_ref().map(|from| from.session_id),
            forked_from_turn: line.forked_from.map(|from| from.turn),
            ..Session::new(line.user_id, line.created_at)
        };
        Self { session: session.with_ttl(line.ttl_seconds), memory: line.memory }
    }
}

impl TurnLine {
    /// A turn's line without its texts.
    fn of(turn: Turn) -> (Self, [Option<String>; 2]) {
        let usage = turn.usage();
        let error = turn.error_code.map(|code| TurnError {
            code: Text(code),
            message: Text(turn.error_message.unwrap_or_default()),
        });
        let line = Self {
            turn: turn.turn,
            status: turn.status,
            message: None,
            response: None,
            error,
            model: turn.model.map(Text),
            usage,
            execution_us: turn.execution_us,
            request_id: turn.request_id,
            metadata: turn.metadata,
            created_at: turn.created_at,
            completed_at: turn.completed_at,
        };
        (line, [Some(turn.message), turn.response])
    }

    fn text(&mut self, field: Field) -> &mut Option<Text> {
        match field {
            Field::Message => &mut self.message,
            Field::Response => &mut self.response,
        }
    }

    /// The turn, with the texts that came in pieces; where it does not fit, the field and what to mend.
    fn into_turn(mut self, session_id: SessionId, pieces: Pieces) -> Result<Turn, Misfit> {
        let Pieces { message, response } = pieces;
        for (field, name, text) in
            [(Field::Message, "message", message), (Field::Response, "response", response)]
        {
            match (self.text(field), text) {
                (Some(_), Some(_)) => return misfit(name, "is here and in the pieces before"),
                (whole @ None, Some(text)) => *whole = Some(Text(text)),
                (_, None) => {}
            }
        }
        let Some(Text(message)) = self.message else { return misfit("message", "is required") };
        match self.status {
            TurnStatus::Running => return misfit("status", "must not be running"),
            TurnStatus::Completed if self.response.is_none() => {
                return misfit("response", "is required where status is completed");
            }
            _ => {}
        }
        let usage = self.usage;
        let counts = usage.map(|usage| [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens]);
        if counts.into_iter().flatten().any(|tokens| tokens < 0) {
            return misfit("usage", "must not be negative");
        }
        if self.execution_us.is_some_and(|span| span < 0) {
            return misfit("execution_us", "must not be negative");
        }
        let (error_code, error_message) = self.error.map(|error| (error.code.0, error.message.0)).unzip();
        Ok(Turn {
            session_id,
            turn: self.turn,
            status: self.status,
            message,
            response: self.response.map(|text| text.0),
            error_code,
            error_message,
            model: self.model.map(|text| text.0),
            prompt_tokens: usage.map(|usage| usage.prompt_tokens),
            completion_tokens: usage.map(|usage| usage.completion_tokens),
            total_tokens: usage.map(|usage| usage.total_tokens),
            execution_us: self.execution_us,
            request_id: self.request_id,
            metadata: self.metadata,
            created_at: self.created_at,
            completed_at: self.completed_at,
        })
    }
}

/// Cuts a text into pieces of at most [`PIECE`] bytes of JSON each, never inside a character.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let mut bytes = 0;
        let too_long = text.char_indices().find(|(_, c)| {
            bytes += match c {
                '"' | '\\' | '\u{8}' | '\t' | '\n' | '\u{c}' | '\r' => 2,
                '\0'..='\u{1f}' => 6,
                c => c.len_utf8(),
            };
            bytes > PIECE
        });
        let (piece, others) = text.split_at(too_long.map_or(text.len(), |(at, _)| at));
        rest = too_long.map(|_| others);
        Some(piece)
    })
}

/// The digest as text: `sha256:` and 64 hex digits.
pub fn digest(hash: &Sha256) -> String {
    let digest: [u8; 32] = hash.clone().finalize().into();
    digest.iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

/// Writes the lines of an archive, each to the end of `out`.
#[derive(Default)]
pub struct Writer {
    /// Of every line so far but the first.
    all: Sha256,
    /// Of the lines of the open session.
    own: Sha256,
    open: Option<SessionId>,
    turns: i64,
    counts: Counts,
}

impl Writer {
    pub fn begin(&mut self, out: &mut Vec<u8>, of: Of, now: Timestamp) -> io::Result<()> {
        let (format, atlus) = (FORMAT.to_owned(), env!("CARGO_PKG_VERSION").to_owned());
        write(out, &Line::Archive(Header { format, version: VERSION, of, exported_at: now, atlus }))?;
        Ok(())
    }

    /// Opens a session of which turns up to `through` will follow.
    pub fn session(&mut self, out: &mut Vec<u8>, session: &ArchivedSession, through: i64) -> io::Result<()> {
        let mut line = SessionLine::from(session);
        for turn in line.memory.profile_turns.each() {
            *turn = turn.filter(|turn| *turn <= through);
        }
        (self.open, self.turns, self.own) = (Some(session.session.id), 0, Sha256::new());
        self.line(out, &Line::Session(Box::new(line)))
    }

    pub fn turn(&mut self, out: &mut Vec<u8>, turn: Turn) -> io::Result<()> {
        let (mut line, texts) = TurnLine::of(turn);
        for (field, text) in [Field::Message, Field::Response].into_iter().zip(texts) {
            let Some(text) = text else { continue };
            if pieces(&text).nth(1).is_none() {
                *line.text(field) = Some(Text(text));
                continue;
            }
            for piece in pieces(&text) {
                self.line(out, &Line::Piece(Piece { field, text: Text(piece.to_owned()) }))?;
            }
        }
        self.turns += 1;
        self.line(out, &Line::Turn(Box::new(line)))
    }

    pub fn end_session(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        let Some(session_id) = self.open.take() else { return Ok(()) };
        self.counts.sessions += 1;
        self.counts.turns += self.turns;
        let end = SessionEnd { session_id, turns: self.turns, digest: digest(&self.own) };
        self.line(out, &Line::SessionEnd(end))
    }

    pub fn fact(&mut self, out: &mut Vec<u8>, fact: ArchivedFact) -> io::Result<()> {
        self.counts.facts += 1;
        self.line(out, &Line::Fact(fact))
    }

    pub fn end(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        write(out, &Line::End(End { counts: self.counts, digest: self.digest() }))?;
        Ok(())
    }

    /// Of every line so far but the first.
    pub fn digest(&self) -> String {
        digest(&self.all)
    }

    fn line(&mut self, out: &mut Vec<u8>, line: &Line) -> io::Result<()> {
        let bytes = write(out, line)?;
        self.all.update(bytes);
        if self.open.is_some() {
            self.own.update(bytes);
        }
        Ok(())
    }
}

/// Writes a line; its bytes.
fn write<'a>(out: &'a mut Vec<u8>, line: &Line) -> io::Result<&'a [u8]> {
    let start = out.len();
    serde_json::to_writer(&mut *out, line)?;
    out.push(b'\n');
    match out.get(start..) {
        Some(line) if line.len() <= MAX_LINE => Ok(line),
        _ => Err(io::Error::other("a line would be longer than an archive's may be")),
    }
}

/// What is read from an archive, in this order: sessions, each followed by its turns and its end, then facts.
#[derive(Debug)]
pub enum Item {
    Session(Box<ArchivedSession>),
    Turn(Box<Turn>),
    /// The session is whole, and as it was written.
    SessionEnd,
    Fact(ArchivedFact),
}

/// What is wrong with an archive, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bad {
    /// The first is 1.
    pub line: u64,
    pub field: Option<String>,
    pub problem: String,
    pub kind: BadKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadKind {
    TooLong,
    NotJson,
    Invalid,
}

impl std::error::Error for Bad {}

impl std::fmt::Display for Bad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.field {
            Some(field) => write!(f, "line {}: {field}: {}", self.line, self.problem),
            None => write!(f, "line {}: {}", self.line, self.problem),
        }
    }
}

/// A field that does not fit, and what to mend.
type Misfit = (String, String);

fn misfit<T>(field: &str, problem: &str) -> Result<T, Misfit> {
    Err((field.to_owned(), problem.to_owned()))
}

/// Reads an archive whose bytes come in any portions. Holds at most a line, a portion, and the pieces of one turn.
#[derive(Default)]
pub struct Reader {
    buffer: Vec<u8>,
    /// Where the present line begins, and up to where its end was looked for.
    start: usize,
    scanned: usize,
    lines: u64,
    place: Place,
    all: Sha256,
    own: Sha256,
    counts: Counts,
}

/// What has been read last.
#[derive(Default)]
enum Place {
    #[default]
    Nothing,
    /// The first line, or a session that is whole.
    Sessions,
    Session(Open),
    Facts,
    End,
}

struct Open {
    id: SessionId,
    turns: i64,
    /// The last turn that the session's memory refers to.
    refers_to: i64,
    pieces: Pieces,
}

#[derive(Default)]
struct Pieces {
    message: Option<String>,
    response: Option<String>,
}

impl Reader {
    /// Takes what has come.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.scanned -= mem::take(&mut self.start);
        self.buffer.extend_from_slice(bytes);
    }

    /// What comes next in what was pushed, if that holds something whole.
    pub fn item(&mut self) -> Result<Option<Item>, Bad> {
        while let Some(end) = self.end_of_line()? {
            let line = self.buffer[self.start..end].to_vec();
            (self.start, self.scanned) = (end, end);
            self.lines += 1;
            if let Some(item) = self.read(&line)? {
                return Ok(Some(item));
            }
        }
        Ok(None)
    }

    /// Nothing more will come; fails unless the archive was whole.
    pub fn finish(&mut self) -> Result<(), Bad> {
        if self.start < self.buffer.len() {
            // The last line may lack its end, or more.
            self.push(b"\n");
            self.item().map(|_| ()).or_else(|bad| match bad.kind {
                BadKind::NotJson => Ok(()),
                _ => Err(bad),
            })?;
        }
        match self.place {
            Place::End => Ok(()),
            _ => {
                let problem = "the archive is cut short: its last line, of the type end, is missing";
                Err(self.bad(BadKind::Invalid, None, problem))
            }
        }
    }

    /// What has been read so far; of an open session the turns, too.
    pub fn counts(&self) -> Counts {
        let open = if let Place::Session(open) = &self.place { open.turns } else { 0 };
        Counts { turns: self.counts.turns + open, ..self.counts }
    }

    /// Where the present line ends, if its end has come.
    fn end_of_line(&mut self) -> Result<Option<usize>, Bad> {
        let found = self.buffer[self.scanned..].iter().position(|byte| *byte == b'\n');
        self.scanned = found.map_or(self.buffer.len(), |at| self.scanned + at + 1);
        if self.scanned - self.start > MAX_LINE {
            self.lines += 1;
            return Err(self.bad(BadKind::TooLong, None, format!("must be at most {MAX_LINE} bytes long")));
        }
        Ok(found.map(|_| self.scanned))
    }

    fn read(&mut self, bytes: &[u8]) -> Result<Option<Item>, Bad> {
        let line = self.parse(bytes)?;
        if let (Place::Sessions, Line::Session(_)) = (&self.place, &line) {
            self.own = Sha256::new();
        }
        if let Line::Session(_) | Line::Piece(_) | Line::Turn(_) = line {
            self.own.update(bytes);
        }
        let item = self.accept(line).map_err(|(field, problem)| {
            let field = Some(field).filter(|field| !field.is_empty());
            self.bad(BadKind::Invalid, field, problem)
        })?;
        if self.lines > 1 {
            self.all.update(bytes);
        }
        Ok(item)
    }

    fn parse(&self, bytes: &[u8]) -> Result<Line, Bad> {
        // What a session remembers stands one level deeper here than where it was set.
        if is_deeper(bytes, MAX_DEPTH + 1) {
            let problem = format!("must not nest deeper than {}", MAX_DEPTH + 1);
            return Err(self.bad(BadKind::Invalid, None, problem));
        }
        let value = json::parse(bytes).map_err(|unread| match unread {
            Unread::NotJson(error) => {
                let (column, error) = (error.column(), error.to_string());
                let problem = error.split(" at line ").next().unwrap_or_default();
                self.bad(BadKind::NotJson, None, format!("is not JSON: {problem} (column {column})"))
            }
            Unread::Twice(field) => self.bad(BadKind::Invalid, Some(field), TWICE),
        })?;
        read_line(value).map_err(|(field, problem)| {
            let field = Some(field).filter(|field| !field.is_empty() && field != ".");
            self.bad(BadKind::Invalid, field, problem)
        })
    }

    /// Checks that a line fits where it stands.
    fn accept(&mut self, line: Line) -> Result<Option<Item>, Misfit> {
        match (line, &mut self.place) {
            (Line::Archive(_), place @ Place::Nothing) => {
                *place = Place::Sessions;
                Ok(None)
            }
            (_, Place::Nothing) => misfit("type", "must be archive: this is not the beginning of an archive"),
            (Line::Session(line), place @ Place::Sessions) => {
                let refers_to = line.check()?;
                let (id, turns, pieces) = (line.session_id, 0, Pieces::default());
                *place = Place::Session(Open { id, turns, refers_to, pieces });
                Ok(Some(Item::Session(Box::new((*line).into()))))
            }
            (Line::Piece(piece), Place::Session(open)) => {
                open.pieces.add(piece)?;
                Ok(None)
            }
            (Line::Turn(line), Place::Session(open)) => {
                let expected = open.turns + 1;
                if line.turn != expected {
                    return misfit("turn", &format!("must be {expected}: turns follow each other from 1 on"));
                }
                open.turns = expected;
                let turn = line.into_turn(open.id, mem::take(&mut open.pieces))?;
                Ok(Some(Item::Turn(Box::new(turn))))
            }
            (Line::SessionEnd(line), Place::Session(open)) => {
                open.check(&line, &digest(&self.own))?;
                self.counts.sessions += 1;
                self.counts.turns += open.turns;
                self.place = Place::Sessions;
                Ok(Some(Item::SessionEnd))
            }
            (Line::Fact(fact), place @ (Place::Sessions | Place::Facts)) => {
                fact.check()?;
                self.counts.facts += 1;
                *place = Place::Facts;
                Ok(Some(Item::Fact(fact)))
            }
            (Line::End(line), Place::Sessions | Place::Facts) => {
                line.check(self.counts, &digest(&self.all))?;
                self.place = Place::End;
                Ok(None)
            }
            (_, Place::Session(_)) => misfit("type", "must be turn, piece or session_end within a session"),
            (_, Place::Sessions) => misfit("type", "must be session, fact or end after a session's end"),
            (_, Place::Facts) => misfit("type", "must be fact or end after a fact"),
            (_, Place::End) => misfit("type", "must not follow the archive's last line"),
        }
    }

    fn bad(&self, kind: BadKind, field: Option<String>, problem: impl Into<String>) -> Bad {
        Bad { line: self.lines, field, problem: problem.into(), kind }
    }
}

/// Reads a line by its type.
fn read_line(value: Value) -> Result<Line, Misfit> {
    if !value.is_object() {
        return misfit("", "must be a JSON object");
    }
    let Some(kind) = value["type"].as_str() else { return misfit("type", "is required") };
    match kind {
        "archive" => {
            // Before the rest is looked at, which may be different there.
            if value["format"] != FORMAT {
                return misfit("format", "must be atlus");
            }
            if value["version"] != VERSION {
                return misfit("version", "must be 1: this archive is of another release of ATLUS");
            }
            read_value(value).map(Line::Archive)
        }
        "session" => read_value(value).map(Line::Session),
        "piece" => read_value(value).map(Line::Piece),
        "turn" => read_value(value).map(Line::Turn),
        "session_end" => read_value(value).map(Line::SessionEnd),
        "fact" => read_value(value).map(Line::Fact),
        "end" => read_value(value).map(Line::End),
        _ => misfit("type", "must be archive, session, piece, turn, session_end, fact or end"),
    }
}

impl SessionLine {
    /// The last turn that it refers to.
    fn check(&self) -> Result<i64, Misfit> {
        if self.conversation_turns < 0 {
            return misfit("conversation_turns", "must not be negative");
        }
        if self.forked_from.as_ref().is_some_and(|from| from.turn < 0) {
            return misfit("forked_from.turn", "must not be negative");
        }
        if let Err(problem) = refuse_nul(self.memory.summary.as_deref().unwrap_or_default()) {
            return misfit("memory.summary", &problem);
        }
        let mut profile = self.memory.profile_turns;
        let turns = profile.each().map(|turn| *turn).into_iter().chain([self.memory.summary_through]);
        let turns: Vec<i64> = turns.flatten().collect();
        if turns.iter().any(|turn| *turn < 1) {
            return misfit("memory", "must refer to turns of this session only");
        }
        Ok(turns.into_iter().max().unwrap_or(0))
    }
}

impl Open {
    /// Checks the end of the session, whose lines have this digest.
    fn check(&self, end: &SessionEnd, digest: &str) -> Result<(), Misfit> {
        if self.pieces.message.is_some() || self.pieces.response.is_some() {
            return misfit("type", "must be turn after a piece");
        }
        if end.session_id != self.id {
            return misfit("session_id", &format!("must be {}, the session that is open", self.id));
        }
        if end.turns != self.turns {
            return misfit("turns", &format!("must be {}, the turns that came", self.turns));
        }
        if end.digest != digest {
            return misfit(
                "digest",
                "does not fit: the session's lines were changed since they were written",
            );
        }
        if self.refers_to > self.turns {
            return misfit("turns", "must not be fewer than the session's memory refers to");
        }
        Ok(())
    }
}

impl Pieces {
    fn add(&mut self, Piece { field, text }: Piece) -> Result<(), Misfit> {
        let whole = match field {
            Field::Message => &mut self.message,
            Field::Response => &mut self.response,
        };
        let whole = whole.get_or_insert_default();
        if whole.len() + text.0.len() > MAX_TEXT {
            return misfit("text", &format!("must be at most {MAX_TEXT} bytes long with the pieces before"));
        }
        whole.push_str(&text.0);
        Ok(())
    }
}

impl ArchivedFact {
    fn check(&self) -> Result<(), Misfit> {
        let named = |name: &'static str| move |problem: String| (name.to_owned(), problem);
        check(&self.key, 1, MAX_FACT_KEY).map_err(named("key"))?;
        refuse_nul_in(&self.value).map_err(named("value"))?;
        if self.value.is_null() || self.value.to_string().len() > MAX_FACT_VALUE {
            return misfit("value", &format!("must be at most {MAX_FACT_VALUE} bytes of JSON, and not null"));
        }
        match (self.session_id, self.turn) {
            (None, None) | (Some(_), Some(1..)) => Ok(()),
            _ => misfit("turn", "must be a turn of the session, or null as session_id is"),
        }
    }
}

impl End {
    fn check(&self, counts: Counts, digest: &str) -> Result<(), Misfit> {
        if self.counts != counts {
            let Counts { sessions, turns, facts } = counts;
            let came = format!("does not fit: {sessions} sessions, {turns} turns and {facts} facts came");
            return misfit("sessions", &came);
        }
        if self.digest != digest {
            return misfit("digest", "does not fit: the archive was changed since it was written");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::select};
    use serde_json::json;

    use super::*;

    fn session() -> ArchivedSession {
        let memory = Memory {
            working_memory: WorkingMemory::default(),
            behavior_profile: Profile { verbosity: Verbosity::Low, tone: Tone::Casual, depth: Depth::Normal },
            profile_turns: ProfileTurns { verbosity: Some(1), tone: None, depth: Some(9) },
            summary: None,
            summary_through: None,
            updated_at: Timestamp::from_millis(7),
        };
        ArchivedSession { session: Session::new(UserId::default(), Timestamp::from_millis(5)), memory }
    }

    fn turn(session_id: SessionId, turn: i64, message: &str, response: &str) -> Turn {
        Turn {
            session_id,
            turn,
            status: TurnStatus::Completed,
            message: message.to_owned(),
            response: Some(response.to_owned()),
            error_code: None,
            error_message: None,
            model: Some("m".to_owned()),
            prompt_tokens: None,
            completion_tokens: None,
            total_tokens: None,
            execution_us: Some(3),
            request_id: RequestId::random(),
            metadata: Metadata::default(),
            created_at: Timestamp::from_millis(6),
            completed_at: None,
        }
    }

    fn archive(texts: &[[&str; 2]]) -> Vec<u8> {
        let (mut writer, mut out, session) = (Writer::default(), Vec::new(), session());
        writer.begin(&mut out, Of::Session, Timestamp::from_millis(0)).unwrap();
        writer.session(&mut out, &session, 1).unwrap();
        for (number, [message, response]) in (1..).zip(texts) {
            writer.turn(&mut out, turn(session.session.id, number, message, response)).unwrap();
        }
        writer.end_session(&mut out).unwrap();
        writer.end(&mut out).unwrap();
        out
    }

    fn read(archive: &[u8], portion: usize) -> Result<Vec<Item>, Bad> {
        let (mut reader, mut items) = (Reader::default(), Vec::new());
        for bytes in archive.chunks(portion) {
            reader.push(bytes);
            while let Some(item) = reader.item()? {
                items.push(item);
            }
            assert!(reader.buffer.len() <= MAX_LINE + portion);
        }
        reader.finish().map(|()| items)
    }

    fn texts(items: Vec<Item>) -> Vec<[String; 2]> {
        let turns = items.into_iter().filter_map(|item| match item {
            Item::Turn(turn) => Some([turn.message, turn.response.unwrap()]),
            _ => None,
        });
        turns.collect()
    }

    /// The lines of an archive with one of each kind.
    fn everything() -> Vec<Value> {
        let (mut writer, mut out, session) = (Writer::default(), Vec::new(), session());
        writer.begin(&mut out, Of::User, Timestamp::from_millis(0)).unwrap();
        writer.session(&mut out, &session, 1).unwrap();
        let piece = Piece { field: Field::Response, text: Text("so ".to_owned()) };
        writer.line(&mut out, &Line::Piece(piece)).unwrap();
        let mut turn = TurnLine::of(turn(session.session.id, 1, "Hello", "")).0;
        turn.message = Some(Text("Hello".to_owned()));
        writer.line(&mut out, &Line::Turn(Box::new(turn))).unwrap();
        writer.turns += 1;
        writer.end_session(&mut out).unwrap();
        let (user_id, key, value) = (UserId::default(), "name".to_owned(), json!("Ann"));
        let (session_id, updated_at) = (Some(session.session.id), Timestamp::from_millis(1));
        writer
            .fact(&mut out, ArchivedFact { user_id, key, value, session_id, turn: Some(1), updated_at })
            .unwrap();
        writer.end(&mut out).unwrap();
        assert_eq!(read(&out, 100).unwrap().len(), 4);
        out.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
    }

    /// The bytes of these lines, with the digests that they have now unless they were taken out.
    fn sealed(lines: Vec<Value>) -> Vec<u8> {
        let (mut out, mut all, mut own) = (Vec::new(), Sha256::new(), Sha256::new());
        for (number, mut line) in lines.into_iter().enumerate() {
            match line["type"].as_str() {
                Some("session_end") if line["digest"].is_string() => line["digest"] = digest(&own).into(),
                Some("end") if line["digest"].is_string() => line["digest"] = digest(&all).into(),
                _ => {}
            }
            let line = format!("{line}\n");
            if number > 0 {
                all.update(&line);
                own.update(&line);
            }
            out.extend(line.into_bytes());
        }
        out
    }

    /// What may stand in a field that was not written by us.
    fn any_value() -> impl Strategy<Value = Value> {
        const KNOWN: &[&str] = &[
            "session", "turn", "deleted", "completed", "\0", "2024-01-01T12:00:00.000Z",
            "session_00000000000000aa",
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            (-2..3).prop_map(Value::from),
            select(KNOWN).prop_map(Value::from),
            "(?s:.{0,9})".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 20, 4, |inner| {
            const FIELDS: &[&str] = &["session_id", "turn", "code", "message", "prompt_tokens", "a"];
            let object = vec((select(FIELDS), inner.clone()), 0..4);
            prop_oneof![vec(inner, 0..3).prop_map(Value::from), object.prop_map(Value::from_iter)]
        })
    }

    #[test]
    fn long_texts_go_in_pieces_and_come_back_whole() {
        for c in ["a", "é", "\u{1}", "\"", "\n", "日", "🦀"] {
            let long = c.repeat(900_000 / c.len());
            let archive = archive(&[[&long, "short"], ["short", &long], ["", &long]]);
            assert!(archive.split_inclusive(|b| *b == b'\n').all(|line| line.len() <= MAX_LINE));
            let back = texts(read(&archive, 65_536).unwrap());
            assert!(back == [[&*long, "short"], ["short", &*long], ["", &*long]], "{c:?}");
        }
    }

    #[test]
    fn what_the_session_refers_to_comes_before_its_end() {
        let items = read(&archive(&[["a", "b"]]), 10_000).unwrap();
        let Item::Session(session) = &items[0] else { panic!("{items:?}") };
        assert_eq!(
            session.memory.profile_turns,
            ProfileTurns { verbosity: Some(1), tone: None, depth: None }
        );
        assert!(read(&archive(&[]), 10_000).unwrap_err().problem.contains("memory refers to"));
    }

    #[test]
    fn a_line_is_refused_as_soon_as_it_is_too_long() {
        let mut reader = Reader::default();
        let portion = vec![b'x'; 65_536];
        for _ in 0..16 {
            reader.push(&portion);
            assert!(reader.item().unwrap().is_none());
        }
        reader.push(b"x");
        let bad = reader.item().unwrap_err();
        assert_eq!((bad.line, bad.kind), (1, BadKind::TooLong));
    }

    #[test]
    fn pieces_without_end_are_refused() {
        let mut archive = archive(&[]);
        let end = archive.split_inclusive(|b| *b == b'\n').take(2).map(<[u8]>::len).sum();
        archive.truncate(end);
        let piece =
            json!({"type": "piece", "field": "message", "text": "x".repeat(1_000_000)}).to_string() + "\n";
        archive.extend(piece.repeat(17).bytes());
        let bad = read(&archive, 65_536).unwrap_err();
        assert_eq!((bad.line, bad.field.as_deref()), (19, Some("text")));
    }

    proptest! {
        #[test]
        fn any_texts_come_back_whatever_the_portions(
            given in vec(("[^\0]*", "[^\0]*"), 1..5), portion in 1_usize..5000,
        ) {
            let given: Vec<_> = given.iter().map(|(message, response)| [&**message, &**response]).collect();
            prop_assert_eq!(texts(read(&archive(&given), portion).unwrap()), given);
        }

        #[test]
        fn a_changed_byte_is_found(at in 0_usize..10_000, bit in 0_u8..8) {
            let mut archive = archive(&[["Hello", "Hi"], ["a\u{1}b", "日本"]]);
            let lines: Vec<usize> = archive.split_inclusive(|b| *b == b'\n').map(<[u8]>::len).collect();
            // The first line says what it is, and is in no digest.
            let at = lines[0] + at % (archive.len() - lines[0] - 1);
            archive[at] ^= 1 << bit;
            prop_assert!(read(&archive, 100).is_err());
        }

        #[test]
        fn any_bytes_are_refused(bytes: Vec<u8>, lines in vec("[^\n]{0,40}", 0..5), portion in 1_usize..50) {
            prop_assert!(read(&bytes, portion).is_err());
            let begun = [archive(&[]), bytes].concat();
            prop_assert!(read(&begun, portion).is_err());
            prop_assert!(read(lines.join("\n").as_bytes(), portion).is_err());
        }

        #[test]
        fn lines_that_were_moved_doubled_or_dropped_are_found(order in vec(0_usize..7, 0..10)) {
            let archive = archive(&[["Hello", "Hi"], ["a", "b"]]);
            let lines: Vec<&[u8]> = archive.split_inclusive(|b| *b == b'\n').collect();
            let changed = order.iter().filter_map(|at| lines.get(*at).copied()).collect::<Vec<_>>().concat();
            prop_assert!(changed == archive || read(&changed, 100).is_err());
        }

        #[test]
        fn whatever_a_field_holds_it_is_read_or_refused(line in 1_usize..7, at in any::<usize>(), value in any_value()) {
            let mut archive = everything();
            let fields: Vec<String> = archive[line].as_object().unwrap().keys().cloned().collect();
            archive[line][&fields[at % fields.len()]] = value;
            let _ = read(&sealed(archive), 100);
        }
    }
}
