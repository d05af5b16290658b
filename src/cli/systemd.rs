//! What the service manager is told, where one listens (`sd_notify(3)`): that the server is ready, alive, and stopping.

use std::{future::pending, net::SocketAddr, time::Duration};

use sd_notify::NotifyState::{self, Ready, Status, Stopping, Watchdog};
use tokio::time::interval;
use tokio_util::sync::CancellationToken;

use super::probe;

/// Tells that requests are taken.
pub fn ready(address: SocketAddr) {
    tell(&[Ready, Status(&format!("listening on http://{address}"))]);
}

/// Tells that the server is alive, as often as is asked for, and once it stops. Never returns.
pub async fn report(address: SocketAddr, stopping: CancellationToken) {
    let alive = async {
        match sd_notify::watchdog_enabled() {
            Some(limit) => show_life(address, limit / 3, &stopping, || tell(&[Watchdog])).await,
            None => pending().await,
        }
    };
    let stop = async {
        stopping.cancelled().await;
        tell(&[Stopping, Status("stopping: finishing what is under way")]);
    };
    tokio::join!(alive, stop);
}

/// Shows a sign of life each `period` in which the server answers. Any answer will do: one that is overloaded, or whose
/// database is away, gains nothing by being killed.
async fn show_life(address: SocketAddr, period: Duration, stopping: &CancellationToken, sign: impl Fn()) {
    let (address, mut ticks) = (probe::reachable(address), interval(period));
    loop {
        ticks.tick().await;
        // One that is stopping listens no longer, and has a limit of time of its own.
        if stopping.is_cancelled() || probe::ask(address, "/livez", period).await.is_ok() {
            sign();
        }
    }
}

fn tell(news: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(news) {
        tracing::warn!(%error, "the service manager could not be told");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::{net::TcpListener, time::timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_server_that_does_not_answer_shows_no_sign_of_life() {
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, signs) = (silent.local_addr().unwrap(), Cell::new(0));
        let stopping = CancellationToken::new();
        let mut life =
            Box::pin(show_life(address, Duration::from_secs(1), &stopping, || signs.set(signs.get() + 1)));
        assert!(timeout(Duration::from_secs(5), &mut life).await.is_err());
        assert_eq!(signs.get(), 0);

        stopping.cancel();
        assert!(timeout(Duration::from_secs(5), &mut life).await.is_err());
        assert!(signs.get() > 0);
    }
}
