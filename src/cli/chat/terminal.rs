//! The terminal, or the pipes in its place: lines come in, text goes out.
//!
//! What a model or another person wrote is not trusted: no control character of theirs reaches a terminal.

use std::{
    env,
    io::{self, BufRead, IsTerminal, Write},
    sync::mpsc,
    thread,
};

use rustyline::{DefaultEditor, error::ReadlineError};
use tokio::{signal::ctrl_c, sync::mpsc as channel};

const PROMPT: &str = "> ";
/// After a line that ends in a backslash.
const CONTINUED: &str = ". ";

const PLAIN: &str = "";
const BOLD: &str = "1";
const DIM: &str = "2";
const RED: &str = "31";

/// What comes from whoever sits there.
pub enum Entry {
    Line(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D, or the end of what was piped in.
    End,
}

pub struct Terminal {
    /// Somebody sits there; else input or output is a pipe or a file, and gets nothing but what was asked for.
    pub interactive: bool,
    colours: bool,
    asks: mpsc::Sender<()>,
    entries: channel::UnboundedReceiver<io::Result<Entry>>,
    /// Whether the output ends within a line.
    within_line: bool,
}

impl Terminal {
    pub fn open() -> anyhow::Result<Self> {
        let set = |name| env::var_os(name).filter(|value| !value.is_empty());
        // On a dumb terminal no line can be edited.
        let interactive = io::stdin().is_terminal()
            && io::stdout().is_terminal()
            && set("TERM").is_none_or(|term| term != "dumb");
        let colours = interactive && set("NO_COLOR").is_none();
        let mut editor = if interactive { Some(DefaultEditor::new()?) } else { None };
        if let Some(editor) = &mut editor {
            // One that helps with nothing; without any, the prompt has no style.
            editor.set_helper(Some(()));
        }
        let ((asks, asked), (sender, entries)) = (mpsc::channel(), channel::unbounded_channel());
        // A thread of its own that nobody waits for: reading blocks, and cannot be called off.
        thread::spawn(move || {
            while asked.recv().is_ok() {
                let entry = match &mut editor {
                    Some(editor) => edited(editor, colours),
                    None => piped(),
                };
                if sender.send(entry).is_err() {
                    return;
                }
            }
        });
        Ok(Self { interactive, colours, asks, entries, within_line: false })
    }

    /// Waits for a line.
    pub async fn line(&mut self) -> io::Result<Entry> {
        if self.asks.send(()).is_err() {
            return Ok(Entry::End);
        }
        tokio::select! {
            entry = self.entries.recv() => entry.unwrap_or(Ok(Entry::End)),
            // The editor takes it as a key.
            _ = ctrl_c(), if !self.interactive => Ok(Entry::Interrupted),
        }
    }

    /// A piece of an answer.
    pub fn piece(&mut self, text: &str) -> io::Result<()> {
        let text = clean(text);
        self.within_line = text.chars().last().map_or(self.within_line, |last| last != '\n');
        let mut output = io::stdout().lock();
        output.write_all(text.as_bytes())?;
        output.flush()
    }

    /// Ends the line that the last piece left open.
    pub fn end_line(&mut self) -> io::Result<()> {
        if self.within_line { self.piece("\n") } else { Ok(()) }
    }

    /// The terminal has shown a Ctrl-C as `^C`.
    pub fn interrupted(&mut self) {
        self.within_line |= self.interactive;
    }

    /// Something that was asked for.
    pub fn print(&mut self, text: &str) -> io::Result<()> {
        self.write(io::stdout(), PLAIN, text)
    }

    /// What the user said in the past.
    pub fn quote(&mut self, text: &str) -> io::Result<()> {
        self.write(io::stdout(), BOLD, &format!("{PROMPT}{text}"))
    }

    /// A remark within what was asked for.
    pub fn remark(&mut self, text: &str) -> io::Result<()> {
        self.write(io::stdout(), DIM, text)
    }

    /// Something to know for whoever sits there; pipes do without.
    pub fn hint(&mut self, text: &str) -> io::Result<()> {
        if self.interactive { self.remark(text) } else { Ok(()) }
    }

    /// Something to know in any case.
    pub fn notice(&mut self, text: &str) -> io::Result<()> {
        if self.interactive { self.remark(text) } else { self.write(io::stderr(), PLAIN, text) }
    }

    /// What could not be done.
    pub fn failure(&mut self, text: &str) -> io::Result<()> {
        if self.interactive {
            self.write(io::stdout(), RED, text)
        } else {
            self.write(io::stderr(), PLAIN, text)
        }
    }

    fn write(&mut self, mut output: impl Write, style: &str, text: &str) -> io::Result<()> {
        self.end_line()?;
        let text = clean(text);
        writeln!(output, "{}", styled(self.colours, style, text.strip_suffix('\n').unwrap_or(&text)))
    }
}

/// Reads a line from the terminal, and further ones after a backslash.
fn edited(editor: &mut DefaultEditor, colours: bool) -> io::Result<Entry> {
    let (mut text, mut prompt) = (String::new(), PROMPT);
    loop {
        let line = match editor.readline(&(prompt, styled(colours, BOLD, prompt))) {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => return Ok(Entry::Interrupted),
            Err(ReadlineError::Eof) => return Ok(Entry::End),
            Err(error) => return Err(io::Error::other(error)),
        };
        let Some(start) = line.strip_suffix('\\') else {
            text.push_str(&line);
            editor.add_history_entry(&text).map_err(io::Error::other)?;
            return Ok(Entry::Line(text));
        };
        text.push_str(start);
        text.push('\n');
        prompt = CONTINUED;
    }
}

/// Reads a line from a pipe.
fn piped() -> io::Result<Entry> {
    let mut line = Vec::new();
    let end = io::stdin().lock().read_until(b'\n', &mut line)? == 0;
    Ok(if end { Entry::End } else { Entry::Line(String::from_utf8_lossy(&line).into_owned()) })
}

fn styled(colours: bool, style: &str, text: &str) -> String {
    if colours && style != PLAIN { format!("\x1b[{style}m{text}\x1b[0m") } else { text.to_owned() }
}

/// Text without the control characters that would let it rule the terminal.
fn clean(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

/// Text as one line.
pub fn one_line(text: &str) -> String {
    text.split(char::is_control).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_control_character_is_shown_but_line_ends_and_tabs() {
        let hostile = "a\u{1b}[31mb\tc\r\nd\u{7}\u{9b}2J\u{7f}\u{0}é\u{1F600}";
        assert_eq!(clean(hostile), "a[31mb\tc\nd2Jé\u{1F600}");
        assert_eq!(one_line(hostile), "a [31mb c d 2J é\u{1F600}");
    }
}
