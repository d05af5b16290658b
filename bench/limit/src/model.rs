//! A model server that always says the same, in time or slowly.

use std::{fmt::Write as _, io, time::Duration};

use memchr::memmem::find;
use tokio::{io::AsyncWriteExt, net::TcpStream, time::sleep};

use crate::http::Answer;

const WORDS: &str = "This is what a model says that was written for measuring, in a sentence of twenty words, no more and no less.";

/// Speaks as much of OpenAI's chat completions as is asked of it.
#[derive(clap::Args, Clone, Copy)]
pub struct Model {
    /// How long it thinks before it says anything.
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// How long it waits after each word of a stream.
    #[arg(long, default_value_t = 0)]
    gap_ms: u64,
}

impl Answer for Model {
    async fn answer(&self, _head: &[u8], body: &[u8], stream: &mut TcpStream) -> io::Result<()> {
        if self.delay_ms > 0 {
            sleep(Duration::from_millis(self.delay_ms)).await;
        }
        if find(body, b"\"stream\":true").is_some() {
            return self.stream(stream).await;
        }
        let answer = serde_json::json!({
            "id": "1", "object": "chat.completion", "created": 0, "model": "scripted",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": WORDS}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 22, "total_tokens": 42},
        })
        .to_string();
        let length = answer.len();
        let head =
            format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all((head + &answer).as_bytes()).await
    }
}

impl Model {
    async fn stream(&self, stream: &mut TcpStream) -> io::Result<()> {
        let mut out =
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                .to_owned();
        for word in WORDS.split_inclusive(' ') {
            let delta = serde_json::json!({"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "scripted",
                "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": null}]});
            chunk(&mut out, &delta.to_string());
            if self.gap_ms > 0 {
                stream.write_all(out.as_bytes()).await?;
                out.clear();
                sleep(Duration::from_millis(self.gap_ms)).await;
            }
        }
        let last = serde_json::json!({"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "scripted",
            "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]});
        chunk(&mut out, &last.to_string());
        chunk(&mut out, "[DONE]");
        out.push_str("0\r\n\r\n");
        stream.write_all(out.as_bytes()).await
    }
}

fn chunk(out: &mut String, data: &str) {
    // Writing to a string does not fail.
    let _ = write!(out, "{:x}\r\ndata: {data}\n\n\r\n", data.len() + 8);
}
