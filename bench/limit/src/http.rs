//! HTTP/1.1 as small as it can be: what any server pays for being asked over it by the same load generator.

use std::{future::Future, io, sync::Arc};

use memchr::memmem::find;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::{database::Database, token};

/// Answers requests.
pub trait Answer: Clone + Send + Sync + 'static {
    /// Writes the answer to one request.
    fn answer(
        &self,
        head: &[u8],
        body: &[u8],
        stream: &mut TcpStream,
    ) -> impl Future<Output = io::Result<()>> + Send;
}

/// Listens on a port of the system's choosing, tells its address, and answers until the process is ended.
pub async fn serve(answer: impl Answer) -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("http://{}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(converse(stream, answer.clone()));
    }
}

/// Answers the requests of a connection, one after the other.
async fn converse(mut stream: TcpStream, answer: impl Answer) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(4096);
    loop {
        let (head, end) = loop {
            if let Some((head, end)) = ends(&buffer)
                && end <= buffer.len()
            {
                break (head, end);
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        answer.answer(&buffer[..head], &buffer[head..end], &mut stream).await?;
        buffer.drain(..end);
    }
}

/// Where the head ends and where the body will, once the head is there.
fn ends(buffer: &[u8]) -> Option<(usize, usize)> {
    let head = find(buffer, b"\r\n\r\n")? + 4;
    Some((head, head + content_length(&buffer[..head])))
}

/// The length that a head tells of; 0 without one.
pub fn content_length(head: &[u8]) -> usize {
    let line = find(head, b"Content-Length: ").or_else(|| find(head, b"content-length: "));
    let digits = line.map_or(&[][..], |line| &head[line + 16..]);
    digits.iter().take_while(|c| c.is_ascii_digit()).fold(0, |length, c| 10 * length + usize::from(c - b'0'))
}

/// Answers chats from a database, and everything else at once.
#[derive(Clone)]
pub struct Chats(pub Arc<Database>);

impl Answer for Chats {
    async fn answer(&self, head: &[u8], body: &[u8], stream: &mut TcpStream) -> io::Result<()> {
        let outcome = if head.starts_with(b"POST") { self.chat(body).await } else { Ok(true) };
        let answer = match outcome {
            Ok(true) => ANSWER,
            Ok(false) => "HTTP/1.1 409 Conflict\r\ncontent-length: 0\r\n\r\n",
            Err(error) => {
                eprintln!("{error:#}");
                "HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n"
            }
        };
        stream.write_all(answer.as_bytes()).await
    }
}

impl Chats {
    async fn chat(&self, body: &[u8]) -> anyhow::Result<bool> {
        let body = str::from_utf8(body)?;
        let text = |before: &str| {
            let start = body.find(before).map(|at| at + before.len());
            start.and_then(|start| body[start..].split('"').next()).unwrap_or_default()
        };
        let session = u64::from_str_radix(text("\"session_id\":\"session_"), 16)?.cast_signed();
        self.0.chat(session, token(), text("\"message\":\"").to_owned()).await
    }
}

/// As long as the server's answer to the same message.
const ANSWER: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-content-type-options: nosniff\r\n\
    x-frame-options: DENY\r\nreferrer-policy: no-referrer\r\ncontent-security-policy: default-src 'none'; \
    frame-ancestors 'none'\r\ncross-origin-resource-policy: same-origin\r\ncross-origin-opener-policy: same-origin\r\n\
    permissions-policy: camera=(), geolocation=(), microphone=(), payment=(), usb=()\r\ncache-control: no-store\r\n\
    x-request-id: req_3a3940d2441787c9\r\nx-process-time: 0.004\r\ncontent-length: 354\r\n\
    date: Mon, 01 Jan 2024 00:00:00 GMT\r\n\r\n\
    {\"success\":true,\"data\":{\"response\":\"I am ATLUS's built-in responder and cannot answer that. Set \
    ATLUS_MODEL_URL and ATLUS_MODEL to connect a real model.\",\"session_id\":\"session_4400afef2683e580\",\
    \"execution_time\":0.002297,\"request_id\":\"req_3a3940d2441787c9\",\"turn\":1,\"model\":\"builtin\",\
    \"usage\":null,\"temporary\":false},\"timestamp\":\"2024-01-01T00:00:00.000Z\"}";
