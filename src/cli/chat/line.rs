//! What a line asks for.

/// Turns that `/history` shows unless told how many.
const HISTORY: usize = 20;

pub const HELP: &str = "\
/sessions        your sessions, newest first; /sessions more shows further ones
/switch N or ID  go on with another session, by its number in the list or its id
/new [TITLE]     begin a new session
/title TEXT      name this session
/history [N]     the last N turns (20)
/info            this session, its user, its turns, and the model
/help            this list
/quit            end, as Ctrl-D does
//TEXT           say something that begins with a slash
A line that ends in a backslash goes on in the next. Ctrl-C cancels an answer.";

#[derive(Debug, PartialEq)]
pub enum Line<'a> {
    Nothing,
    Message(&'a str),
    Help,
    Sessions,
    MoreSessions,
    Switch(&'a str),
    New(Option<&'a str>),
    Title(&'a str),
    History(usize),
    Info,
    Quit,
    /// It looks like a command and is none; what to say about it.
    Wrong(String),
}

impl<'a> Line<'a> {
    pub fn read(line: &'a str) -> Self {
        let line = line.trim();
        let Some(command) = line.strip_prefix('/') else {
            return if line.is_empty() { Self::Nothing } else { Self::Message(line) };
        };
        if command.starts_with('/') {
            return Self::Message(command);
        }
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let wrong = || Self::Wrong(format!("/{name} is used in another way; /help tells how"));
        match (name, rest.trim()) {
            ("help", "") => Self::Help,
            ("sessions", "") => Self::Sessions,
            ("sessions", "more") => Self::MoreSessions,
            ("switch", to) if !to.is_empty() => Self::Switch(to),
            ("new", title) => Self::New(Some(title).filter(|title| !title.is_empty())),
            ("title", text) if !text.is_empty() => Self::Title(text),
            ("history", "") => Self::History(HISTORY),
            ("history", count) => {
                count.parse().ok().filter(|count| *count > 0).map_or_else(wrong, Self::History)
            }
            ("info", "") => Self::Info,
            ("quit", "") => Self::Quit,
            ("help" | "sessions" | "switch" | "title" | "info" | "quit", _) => wrong(),
            _ => Self::Wrong(format!("Unknown command /{name}; /help lists the commands")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_told_from_messages() {
        let cases = [
            ("  \n", Line::Nothing),
            (" hi there ", Line::Message("hi there")),
            ("//etc/passwd", Line::Message("/etc/passwd")),
            ("/help", Line::Help),
            ("/sessions  more", Line::MoreSessions),
            ("/switch 2\n", Line::Switch("2")),
            ("/new", Line::New(None)),
            ("/new A title", Line::New(Some("A title"))),
            ("/title A title", Line::Title("A title")),
            ("/history", Line::History(20)),
            ("/history 3", Line::History(3)),
            (" /quit", Line::Quit),
        ];
        for (text, line) in cases {
            assert_eq!(Line::read(text), line, "{text:?}");
        }
        for text in ["/", "/nonsense", "/help me", "/title", "/switch ", "/history 0", "/history x", "/Quit"]
        {
            assert!(matches!(Line::read(text), Line::Wrong(_)), "{text:?}");
        }
    }
}
