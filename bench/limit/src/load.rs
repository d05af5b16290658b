//! Chats at a rate that does not follow the answers: what a server does past its knee.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use memchr::memmem::find;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};

use crate::{Walk, http::content_length};

#[derive(clap::Args)]
pub struct Load {
    /// Host and port.
    address: String,
    /// Chats a second.
    #[arg(long)]
    rate: f64,
    /// Connections at most; a chat for which none is free is not sent.
    #[arg(long, default_value_t = 4096)]
    connections: usize,
    #[command(flatten)]
    walk: Walk,
}

#[derive(Default)]
struct Told {
    idle: Mutex<Vec<TcpStream>>,
    open: AtomicUsize,
    good: Mutex<Vec<Duration>>,
    shed: AtomicUsize,
    shed_without_retry_after: AtomicUsize,
    failed: AtomicUsize,
}

impl Load {
    pub async fn run(self) -> anyhow::Result<()> {
        let (ids, told) = (self.walk.ids()?, Arc::new(Told::default()));
        let (began, mut unsent, mut sent) = (Instant::now(), 0, Vec::new());
        for n in 0.. {
            let due = began + Duration::from_secs_f64(f64::from(n) / self.rate);
            if due > began + self.walk.duration() {
                break;
            }
            if due > Instant::now() {
                sleep_until(due).await;
            }
            let idle = lock(&told.idle).pop();
            if idle.is_none() && told.open.load(Ordering::Relaxed) >= self.connections {
                unsent += 1;
                continue;
            }
            if idle.is_none() {
                told.open.fetch_add(1, Ordering::Relaxed);
            }
            let (told, address) = (Arc::clone(&told), self.address.clone());
            let id = &ids[usize::try_from(n)? % ids.len()];
            let body = format!(
                "{{\"session_id\":\"{id}\",\"message\":\"What would you say about number {n} of the list?\"}}"
            );
            sent.push(tokio::spawn(async move { told.chat(idle, &address, &body, due).await }));
        }
        for chat in sent {
            chat.await?;
        }
        // Answers that came after the last chat was sent took their time, too.
        let (seconds, mut good) = (began.elapsed().as_secs_f64(), lock(&told.good));
        let per_second = |count: &AtomicUsize| rate(count.load(Ordering::Relaxed), seconds);
        println!(
            "{}",
            json!({"offered": self.rate, "good": rate(good.len(), seconds), "shed": per_second(&told.shed),
                "shed_without_retry_after": per_second(&told.shed_without_retry_after),
                "failed": per_second(&told.failed), "unsent": rate(unsent, seconds),
                "connections": told.open.load(Ordering::Relaxed),
                "p50": percentile(&mut good, 50), "p99": percentile(&mut good, 99)})
        );
        Ok(())
    }
}

impl Told {
    /// Sends a chat that was due at a moment, and notes what came of it.
    async fn chat(&self, idle: Option<TcpStream>, address: &str, body: &str, due: Instant) {
        match timeout(Duration::from_secs(30), exchange(idle, address, body)).await {
            Ok(Ok((stream, head))) => {
                if head.starts_with("HTTP/1.1 200") {
                    lock(&self.good).push(due.elapsed());
                } else if head.starts_with("HTTP/1.1 503") {
                    self.shed.fetch_add(1, Ordering::Relaxed);
                    let bare = !head.to_ascii_lowercase().contains("\r\nretry-after:");
                    self.shed_without_retry_after.fetch_add(usize::from(bare), Ordering::Relaxed);
                } else {
                    self.failed.fetch_add(1, Ordering::Relaxed);
                }
                lock(&self.idle).push(stream);
            }
            _ => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                self.open.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

/// Sends a request; returns its connection and the head of the answer.
async fn exchange(idle: Option<TcpStream>, address: &str, body: &str) -> io::Result<(TcpStream, String)> {
    let mut stream = match idle {
        Some(stream) => stream,
        None => TcpStream::connect(address).await?,
    };
    stream.set_nodelay(true)?;
    let length = body.len();
    let request = format!(
        "POST /api/v1/chat HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::with_capacity(1024);
    loop {
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let Some(head) = find(&answer, b"\r\n\r\n") else { continue };
        if answer.len() >= head + 4 + content_length(&answer[..head]) {
            answer.truncate(head);
            return Ok((stream, String::from_utf8_lossy(&answer).into_owned()));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[expect(clippy::cast_precision_loss, reason = "counts of one run")]
pub fn rate(count: usize, seconds: f64) -> f64 {
    count as f64 / seconds
}

/// In milliseconds; sorts what was measured.
pub fn percentile(took: &mut [Duration], percent: usize) -> Option<f64> {
    took.sort_unstable();
    took.get(took.len() * percent / 100).map(|took| took.as_secs_f64() * 1e3)
}
