//! A connection that is given up when its client begins a request and does not go on, or takes nothing of what it is
//! sent. What is idle between requests is hyper's affair, and a body's time that of whoever reads it.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

use super::places::Place;

/// How long and how much is read on from a client that is told no more, so that it gets to read what it was told:
/// closing on unread bytes is a reset, which throws away what is on its way.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 4 << 20;

/// How long a client may keep a connection waiting.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// Until the head of a request is there, from its first byte on; of the first one, from the connection on.
    pub head: Duration,
    /// Until it takes more of what there is to send.
    pub write: Duration,
}

/// A stream with little patience.
pub(super) struct Patient<S> {
    stream: S,
    place: Arc<Place>,
    patience: Patience,
    /// The wait for a request that was last seen.
    wait: Option<u64>,
    /// When the head that has begun must be there.
    head: Option<Deadline>,
    /// When the client must have taken more of what is sent.
    write: Option<Deadline>,
    /// Until when, after the last word, it is read on, and how much that was so far.
    linger: Option<(Deadline, usize)>,
}

type Deadline = Pin<Box<Sleep>>;

fn deadline(time: Duration) -> Deadline {
    Box::pin(sleep_until(Instant::now() + time))
}

impl<S> Patient<S> {
    pub fn new(stream: S, place: Arc<Place>, patience: Patience) -> Self {
        let wait = place.wait();
        Self { stream, place, patience, wait, head: Some(deadline(patience.head)), write: None, linger: None }
    }

    /// Gives up if what is written has not been taken for too long.
    fn taken<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.write = None;
            return written;
        }
        let patience = self.patience.write;
        ready!(self.write.get_or_insert_with(|| deadline(patience)).as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let wait = self.place.wait();
        if wait != self.wait {
            (self.wait, self.head) = (wait, None);
        }
        if read.is_pending() {
            let Some(head) = &mut self.head else { return Poll::Pending };
            ready!(head.as_mut().poll(cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        if wait.is_some() && self.head.is_none() && buffer.filled().len() > before {
            self.head = Some(deadline(self.patience.head));
        }
        read
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.taken(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.taken(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, linger, .. } = &mut *self;
        if linger.is_none() {
            ready!(Pin::new(&mut *stream).poll_shutdown(cx))?;
        }
        let (until, bytes) = linger.get_or_insert_with(|| (deadline(LINGER), 0));
        let mut scrap = [0; 8192];
        while *bytes < LINGER_BYTES {
            let mut scrap = ReadBuf::new(&mut scrap);
            if Pin::new(&mut *stream).poll_read(cx, &mut scrap)?.is_pending() {
                return until.as_mut().poll(cx).map(Ok);
            }
            if scrap.filled().is_empty() {
                break;
            }
            *bytes += scrap.filled().len();
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        time::timeout,
    };

    use super::{super::places::Places, *};

    const PATIENCE: Patience = Patience { head: Duration::from_secs(10), write: Duration::from_secs(30) };

    /// A connection with room for four bytes on the way, its client, and its place.
    fn connected() -> (Patient<DuplexStream>, DuplexStream, Arc<Place>) {
        let place = Places::new(1, 1, Vec::new()).take(Ipv4Addr::LOCALHOST.into()).unwrap();
        let (server, client) = duplex(4);
        (Patient::new(server, place.clone(), PATIENCE), client, place)
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_sends_nothing_is_given_up() {
        let (mut server, _client, _place) = connected();
        let started = Instant::now();
        assert_eq!(server.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(started.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_comes_byte_by_byte_has_no_more_time_than_any_other() {
        let (mut server, mut client, place) = connected();
        // The second request's time counts from its first byte.
        drop(place.work());
        assert!(timeout(Duration::from_secs(50), server.read_u8()).await.is_err());
        let started = Instant::now();
        tokio::spawn(async move {
            while client.write_all(b"x").await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        while server.read_u8().await.is_ok() {}
        assert_eq!(started.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_under_way_may_take_its_time() {
        let (mut server, mut client, place) = connected();
        client.write_all(b"x").await.unwrap();
        server.read_u8().await.unwrap();
        let work = place.work();
        assert!(timeout(Duration::from_secs(3600), server.read_u8()).await.is_err());
        drop(work);
        // Nor has the next begun.
        assert!(timeout(Duration::from_secs(3600), server.read_u8()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_given_up_and_a_slow_one_is_not() {
        let (mut server, mut client, place) = connected();
        let _work = place.work();
        let reader = tokio::spawn(async move {
            for _ in 0..10 {
                tokio::time::sleep(Duration::from_secs(29)).await;
                client.read_u8().await.unwrap();
            }
            client
        });
        server.write_all(b"twelve bytes").await.unwrap();
        let _client = reader.await.unwrap();
        server.write_all(b"xx").await.unwrap();
        let started = Instant::now();
        assert_eq!(server.write_all(b"x").await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(started.elapsed().as_secs(), 30);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_still_sends_gets_to_read_the_last_word() {
        let (mut server, mut client, _place) = connected();
        server.write_all(b"no").await.unwrap();
        let client = tokio::spawn(async move {
            client.write_all(&[b'x'; 1000]).await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            (answer, client)
        });
        let started = Instant::now();
        server.shutdown().await.unwrap();
        let (answer, _client) = client.await.unwrap();
        assert_eq!((answer.as_str(), started.elapsed().as_secs()), ("no", LINGER.as_secs()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_with_a_sign_of_life_now_and_then_goes_on() {
        let (mut server, mut client, place) = connected();
        let _work = place.work();
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_secs(15)).await;
            server.write_all(b":\n\n").await.unwrap();
            client.read_exact(&mut [0; 3]).await.unwrap();
        }
    }
}
