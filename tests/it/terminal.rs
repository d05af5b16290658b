//! `atlus chat`: through pipes, and on a terminal.

use std::{
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::{Child, ChildStdin, Command},
    time::timeout,
};

use crate::{
    harness::{Database, Process, atlus, on_both},
    models::{Script, Upstream},
};

/// What came of a conversation through pipes.
#[derive(Debug)]
struct Piped {
    code: i32,
    output: String,
    errors: String,
}

/// Holds a conversation through pipes. Whatever is said in it, nothing that rules a terminal comes out.
async fn piped(args: &[&str], variables: &[(&str, &str)], lines: &[&str]) -> Piped {
    let args: Vec<_> = ["chat"].iter().chain(args).copied().collect();
    let mut command = atlus(&args, variables);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let lines = lines.join("\n") + "\n";
    // One that does not start reads nothing.
    let _ = input.write_all(lines.as_bytes()).await;
    drop(input);
    let ended = timeout(Duration::from_secs(60), child.wait_with_output()).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (output, errors) = (text(ended.stdout), text(ended.stderr));
    for text in [&output, &errors] {
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
    }
    Piped { code: ended.status.code().unwrap(), output, errors }
}

/// Reads until this has been said; everything that was said.
async fn until(output: &mut (impl AsyncRead + Unpin), heard: &mut String, wanted: &str) {
    let found = timeout(Duration::from_secs(60), async {
        let mut piece = [0; 1024];
        while !heard.contains(wanted) {
            let length = output.read(&mut piece).await.unwrap();
            assert_ne!(length, 0, "no {wanted:?} in {heard:?}");
            heard.push_str(&String::from_utf8_lossy(&piece[..length]));
        }
    });
    assert!(found.await.is_ok(), "no {wanted:?} in {heard:?}");
}

/// A long answer in small pieces.
fn slowly(_: &str) -> Script {
    Script::Stream { pieces: vec!["half ".into(); 1000], pause: Duration::from_millis(50), whole: true }
}

/// Variables of a server with a scripted model.
fn model(upstream: &Upstream) -> [(&str, &str); 2] {
    [("ATLUS_MODEL_URL", &upstream.url), ("ATLUS_MODEL", "scripted")]
}

on_both! {
    async fn a_conversation_with_a_database_leaves_nothing_but_what_was_said(database: Database) {
        let variables = database.variables();
        let silent = piped(&[], &variables, &[]).await;
        assert_eq!((silent.code, silent.output.as_str(), silent.errors.as_str()), (0, "", ""));
        let none = piped(&[], &variables, &["/sessions", "/info"]).await;
        assert_eq!(none.output, "user     default_user\nmodel    builtin (builtin)\n");

        let said = piped(&[], &variables, &["my name is John", "", "What's my name?"]).await;
        assert_eq!(said.output, "Nice to meet you, John.\nYour name is John.\n");
        assert_eq!((said.code, said.errors.as_str()), (0, ""));

        let again = piped(&["-c"], &variables, &["What's my name?"]).await;
        assert_eq!((again.code, again.output.as_str(), again.errors.as_str()), (0, "Your name is John.\n", ""));
        let other = piped(&["--continue", "--user", "somebody"], &variables, &["What's my name?"]).await;
        assert!(other.output.contains("not told me") && other.errors.contains("No session to continue"), "{other:?}");
        let listed = piped(&[], &variables, &["/sessions"]).await;
        assert!(listed.output.lines().count() == 1 && listed.output.ends_with("active    my name is John\n"), "{listed:?}");
    }

    async fn a_conversation_with_a_server_is_the_servers(database: Database) {
        let server = Process::start(&database, &[]).await;
        let named = ["--server", &server.base, "--user", "user_123"];
        let said = piped(&named, &[], &["/new Names", "My name is John"]).await;
        assert_eq!((said.code, said.output.as_str()), (0, "Nice to meet you, John.\n"));
        let kept = server.get("/sessions?user_id=user_123").await;
        let [session] = kept.items() else { panic!("{kept:?}") };
        assert_eq!(session["title"], "Names");
        let id = session["session_id"].as_str().unwrap();

        // The session's user is who goes on with it.
        let variables = [("ATLUS_SERVER", server.base.as_str())];
        let lines = ["What's my name?", "/history 1", "/info", "/sessions"];
        let again = piped(&["--session", id], &variables, &lines).await;
        assert!(again.output.starts_with("Your name is John.\n> What's my name?\nYour name is John.\n"), "{again:?}");
        for part in [id, "title    Names", "state    active", "turns    2", "user     user_123", "  1  session_"] {
            assert!(again.output.contains(part), "{part:?} in {again:?}");
        }

        let unknown = piped(&["--session", "session_0000000000000000"], &variables, &["hi"]).await;
        assert_eq!((unknown.code, unknown.output.as_str()), (1, ""));
        assert_eq!(unknown.errors, "atlus: Session session_0000000000000000 not found (SESSION_NOT_FOUND)\n");
    }

    async fn commands_find_and_name_sessions(database: Database) {
        let server = Process::start(&database, &[]).await;
        let mut ids = Vec::new();
        for number in 0..12 {
            let id = server.session(json!({})).await;
            server.say(&id, &format!("say number {number} of quite a number of sessions")).await;
            ids.push(id);
        }
        server.patch(&format!("/sessions/{}", ids[10]), json!({"is_active": false})).await;
        let lines = [
            "/sessions", "/sessions more", "/sessions more", "/switch 12", "say still here", "/title The first",
            "/history 3", "/switch 13", &format!("/switch {}", ids[11]), "/history", "/switch 2", "too late",
        ];
        let said = piped(&["--server", &server.base], &[], &lines).await;
        assert_eq!(said.code, 1);
        let lines: Vec<_> = said.output.lines().collect();
        for (line, number) in lines.iter().zip((0..12).rev()) {
            let state = if number == 10 { "inactive" } else { "active  " };
            assert!(line.contains(&ids[number]) && line.contains(state), "{said:?}");
            let words: String = format!("say number {number} of quite a number of sessions").chars().take(40).collect();
            assert!(line.ends_with(&format!("{words}…")), "{said:?}");
        }
        assert_eq!(lines[12..], [
            "still here", "> say number 0 of quite a number of sessions", "number 0 of quite a number of sessions",
            "> say still here", "still here",
            "> say number 11 of quite a number of sessions", "number 11 of quite a number of sessions",
        ]);
        assert_eq!(said.errors.lines().collect::<Vec<_>>(), [
            "That is all; /sessions lists from the newest", "No session has the number 13; /sessions numbers them",
            "It is not active any more: it can be read, and that is all",
            &format!("Invalid or inactive session: {} (INVALID_SESSION)", ids[10]),
        ]);
        assert_eq!(server.get(&format!("/sessions/{}", ids[0])).await.data()["title"], "The first");
    }

    async fn what_looks_like_a_command_is_never_said(database: Database) {
        let variables = database.variables();
        let wrong = piped(&[], &variables, &["/nonsense", "/title", "/history"]).await;
        assert_eq!((wrong.code, wrong.output.as_str()), (1, ""));
        assert_eq!(wrong.errors.lines().collect::<Vec<_>>(), [
            "Unknown command /nonsense; /help lists the commands", "/title is used in another way; /help tells how",
            "There is no session yet; the first message makes one",
        ]);
        let help = piped(&[], &variables, &["/help", "//nonsense", "What did I just say?", "/quit", "never"]).await;
        assert!(help.output.starts_with("/sessions") && help.output.ends_with("You just said: \"/nonsense\"\n"), "{help:?}");
        assert_eq!(help.code, 0);
    }

    async fn nothing_that_was_written_rules_the_terminal(database: Database) {
        let server = Process::start(&database, &[]).await;
        let hostile = "\u{1b}]0;owned\u{7}\u{9b}2J\r";
        let id = server.session(json!({"title": hostile})).await;
        server.say(&id, &format!("say {hostile}red")).await;
        let lines = ["/sessions", "/history", "/info", &format!("say {hostile}blue"), &format!("/title {hostile}"), hostile];
        let said = piped(&["--server", &server.base, "--session", &id], &[], &lines).await;
        for part in ["]0;owned 2J\n", "title    ]0;owned 2J\n", "> say ]0;owned2Jred\n]0;owned2Jred\n", "\n]0;owned2Jblue\n"] {
            assert!(said.output.contains(part), "{part:?} in {said:?}");
        }
        let refused = piped(&["--server", &server.base, "--session", hostile], &[], &[]).await;
        assert_eq!(refused.code, 1);
    }

    async fn the_last_message_decides_how_it_ends(database: Database) {
        let upstream = Upstream::start(|message| match message {
            "fail" => Script::Raw(400, vec![], json!({"error": {"message": "no such\nthing"}}).to_string()),
            "cut" => Script::Stream { pieces: vec!["half".into()], pause: Duration::ZERO, whole: false },
            other => Script::Say(format!("You said: {other}")),
        })
        .await;
        let variables: Vec<_> = database.variables().into_iter().chain(model(&upstream)).collect();
        let mended = piped(&[], &variables, &["fail", "fine"]).await;
        assert_eq!((mended.code, mended.output.as_str()), (0, "You said: fine\n"));
        assert_eq!(mended.errors, "The model server answered 400: no suchthing (UPSTREAM_ERROR)\n");
        let failed = piped(&[], &variables, &["fine", "cut", "/history"]).await;
        assert_eq!(failed.code, 1);
        assert!(failed.output.starts_with("You said: fine\nhalf\n> fine\nYou said: fine\n> cut\n(failed: "), "{failed:?}");
        assert!(failed.errors.ends_with("(UPSTREAM_ERROR)\n") && failed.errors.lines().count() == 1, "{failed:?}");
    }

    async fn a_stream_that_breaks_is_resumed_without_loss(database: Database) {
        let pieces: Vec<_> = (0..8).map(|i| format!("pièce {i} \u{1F600} ")).collect();
        let said = pieces.concat();
        let upstream = Upstream::start(move |_| {
            Script::Stream { pieces: pieces.clone(), pause: Duration::from_millis(10), whole: true }
        })
        .await;
        let server = Process::start(&database, &model(&upstream)).await;
        // Within the event that brings the first text, and within the one after it.
        for event in 1..=2 {
            let cutter = Cutter::start(&server.base, event).await;
            let variables = [("ATLUS_SERVER", cutter.url.as_str()), ("ATLUS_API_KEY", "atlus_key")];
            let heard = piped(&[], &variables, &["go"]).await;
            assert_eq!((heard.code, heard.output), (0, format!("{said}\n")), "{event}: {}", heard.errors);
            let asked = cutter.asked.lock().unwrap().to_lowercase();
            assert!(asked.contains("last-event-id: ") && asked.contains("authorization: bearer atlus_key"), "{asked}");
        }
    }

    async fn a_server_that_dies_is_told_of(database: Database) {
        let upstream = Upstream::start(slowly).await;
        let server = Process::start(&database, &model(&upstream)).await;
        let mut command = atlus(&["chat", "--server", &server.base], &[]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(b"go\n").await.unwrap();
        until(child.stdout.as_mut().unwrap(), &mut String::new(), "half ").await;
        server.kill().await;
        let mut errors = String::new();
        until(child.stderr.as_mut().unwrap(), &mut errors, "may still complete on the server").await;
        assert!(errors.contains("The server cannot be reached: Connection refused"), "{errors}");
        assert_eq!(child.wait().await.unwrap().code(), Some(1));
    }

    async fn an_answer_under_way_is_kept_when_its_terminal_is_closed(database: Database) {
        let upstream = Upstream::start(|_| {
            Script::Stream { pieces: vec!["half ".into(); 20], pause: Duration::from_millis(50), whole: true }
        })
        .await;
        let variables: Vec<_> = database.variables().into_iter().chain(model(&upstream)).collect();
        let mut child = atlus(&["chat"], &variables)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(b"go\n").await.unwrap();
        until(child.stdout.as_mut().unwrap(), &mut String::new(), "half ").await;
        let pid = child.id().unwrap().to_string();
        assert!(std::process::Command::new("kill").args(["-HUP", &pid]).status().unwrap().success());
        assert_eq!(timeout(Duration::from_secs(60), child.wait()).await.unwrap().unwrap().code(), Some(1));
        let kept = piped(&["-c"], &variables, &["/history"]).await;
        assert_eq!(kept.output, format!("> go\n{}\n", "half ".repeat(20)));
    }

    async fn ctrl_c_cancels_an_answer_and_comes_back_to_the_prompt(database: Database) {
        let upstream = Upstream::start(slowly).await;
        let server = Process::start(&database, &model(&upstream)).await;
        let session = server.session(json!({})).await;
        let mut terminal = Terminal::start(&["--server", &server.base, "--session", &session], &[]);
        terminal.asks().await;
        terminal.types("go\r").await;
        terminal.shows("half half").await;
        terminal.types("\u{3}").await;
        terminal.shows("Cancelled").await;
        terminal.asks().await;
        terminal.types("/info\r").await;
        terminal.shows("turns    0").await;
        upstream.left_times(1).await;
        let turn = server.get(&format!("/sessions/{session}/turns/1")).await;
        assert_eq!(turn.data()["status"], "cancelled");
        // Not on the same breath: a line in between is a new start.
        for line in ["\u{3}", "/nonsense\r", "\u{3}"] {
            terminal.asks().await;
            terminal.types(line).await;
            terminal.shows(if line == "\u{3}" { "Ctrl-C once more" } else { "Unknown command" }).await;
        }
        terminal.asks().await;
        terminal.types("\u{3}").await;
        assert_eq!(terminal.ends().await, 0);
    }
}

#[tokio::test]
async fn a_terminal_has_a_prompt_and_colours_unless_told_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}", folder.path().join("atlus.db").display());
    let variables = [("ATLUS_DATABASE_URL", url.as_str())];
    let mut terminal = Terminal::start(&[], &variables);
    terminal.shows("ATLUS ").await;
    terminal.asks().await;
    terminal.shows("\u{1b}[1m> \u{1b}[0m").await;
    terminal.types("say one \\\r").await;
    terminal.shows("\u{1b}[1m. \u{1b}[0m").await;
    terminal.types("two\r").await;
    terminal.shows("\u{1b}[2mSession session_").await;
    terminal.shows("one \r\ntwo\r\n").await;
    terminal.asks().await;
    terminal.types("/nonsense\r").await;
    terminal.shows("\u{1b}[31mUnknown command").await;
    terminal.asks().await;
    terminal.types("\u{4}").await;
    assert_eq!(terminal.ends().await, 0);

    let variables = [("ATLUS_DATABASE_URL", url.as_str()), ("NO_COLOR", "1")];
    let mut terminal = Terminal::start(&["-c"], &variables);
    terminal.shows("> say one \r\ntwo\r\none \r\ntwo\r\n").await;
    terminal.asks().await;
    terminal.types("/quit\r").await;
    assert_eq!(terminal.ends().await, 0);
    // No style or colour at all; what else the line editor sends moves the cursor.
    for style in ["\u{1b}[0m", "\u{1b}[1m", "\u{1b}[2m"] {
        assert!(!terminal.all.contains(style), "{:?}", terminal.all);
    }
}

#[tokio::test]
async fn what_cannot_be_talked_to_is_told_at_once() {
    for (server, told) in [
        ("http://me:secret@127.0.0.1:1/", "no ATLUS at http://127.0.0.1:1: The server cannot be reached"),
        ("localhost:5000", "--server must be a URL such as http://127.0.0.1:5000"),
    ] {
        let refused = piped(&["--server", server], &[], &["hi"]).await;
        assert_eq!((refused.code, refused.output.as_str()), (1, ""));
        assert!(refused.errors.contains(told) && !refused.errors.contains("secret"), "{refused:?}");
    }
}

/// Stands before a server, and cuts the first connection on which a stream comes.
struct Cutter {
    url: String,
    /// Everything that was asked.
    asked: Arc<Mutex<String>>,
}

impl Cutter {
    /// Cuts within the event of this number, the first being 0.
    async fn start(base: &str, event: usize) -> Self {
        let server = base.strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (asked, cut) = (Arc::new(Mutex::new(String::new())), Arc::new(AtomicBool::new(false)));
        let log = asked.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&server).await.unwrap();
                let (log, cut) = (log.clone(), cut.clone());
                let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                    (client.into_split(), server.into_split());
                let asking = tokio::spawn(async move {
                    let mut piece = [0; 4096];
                    while let Ok(length @ 1..) = from_client.read(&mut piece).await {
                        log.lock().unwrap().push_str(&String::from_utf8_lossy(&piece[..length]));
                        to_server.write_all(&piece[..length]).await.unwrap();
                    }
                });
                tokio::spawn(async move {
                    let (mut passed, mut piece) = (Vec::new(), [0; 4096]);
                    while let Ok(length @ 1..) = from_server.read(&mut piece).await {
                        let before = passed.len();
                        passed.extend_from_slice(&piece[..length]);
                        let text = String::from_utf8_lossy(&passed);
                        let end = text.match_indices("event: ").nth(event).map(|(at, _)| at + 8);
                        if let Some(end) = end.filter(|_| !cut.swap(true, Ordering::SeqCst)) {
                            // What the text's stand-ins for broken characters add is beside the point.
                            let end = end.clamp(before, passed.len());
                            let _ = to_client.write_all(&passed[before..end]).await;
                            break;
                        }
                        if to_client.write_all(&passed[before..]).await.is_err() {
                            break;
                        }
                    }
                    asking.abort();
                });
            }
        });
        Self { url, asked }
    }
}

/// `atlus chat` on a terminal of its own.
struct Terminal {
    child: Child,
    input: ChildStdin,
    /// What was shown since the last look.
    shown: String,
    all: String,
}

impl Terminal {
    fn start(args: &[&str], variables: &[(&str, &str)]) -> Self {
        let command = format!("exec {} chat {}", env!("CARGO_BIN_EXE_atlus"), args.join(" "));
        let mut child = Command::new("/usr/bin/env")
            .args(["script", "-qec", &command, "/dev/null"])
            .env_clear()
            .envs(variables.iter().copied())
            .envs([("TERM", "xterm"), ("SHELL", "/bin/sh"), ("PATH", "/usr/local/bin:/usr/bin:/bin")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        Self { child, input, shown: String::new(), all: String::new() }
    }

    /// Waits until it shows this, after what was waited for before.
    async fn shows(&mut self, text: &str) {
        let before = self.shown.len();
        until(self.child.stdout.as_mut().unwrap(), &mut self.shown, text).await;
        self.all.push_str(&self.shown[before..]);
        let end = self.shown.find(text).unwrap() + text.len();
        self.shown.drain(..end);
    }

    /// Waits until it takes keys; what is typed before that is the terminal's own business.
    async fn asks(&mut self) {
        // So the line editor tells that it takes what is pasted as such.
        self.shows("\u{1b}[?2004h").await;
    }

    async fn types(&mut self, keys: &str) {
        self.input.write_all(keys.as_bytes()).await.unwrap();
        self.input.flush().await.unwrap();
    }

    /// Waits for its end; the exit code.
    async fn ends(&mut self) -> i32 {
        let mut rest = String::new();
        let read = self.child.stdout.as_mut().unwrap().read_to_string(&mut rest);
        timeout(Duration::from_secs(60), read).await.unwrap().unwrap();
        self.all.push_str(&rest);
        self.child.wait().await.unwrap().code().unwrap()
    }
}
