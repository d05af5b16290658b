//! Who is connected: how many there may be, how many of one client, and who makes room for a newcomer.
//!
//! A server whose places are all taken has to turn somebody away. A newcomer may be anybody; a connection that has
//! waited for long without a request is the one that misses its place least, and a thousand that never send one can
//! keep nobody out.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use ipnet::IpNet;
use tokio::sync::Notify;

/// How often the log says that places are short.
const WARNING: Duration = Duration::from_secs(60);

/// Places for connections.
pub(super) struct Places {
    max: usize,
    max_per_client: usize,
    /// Peers that are not counted by client.
    uncounted: Vec<IpNet>,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    all: usize,
    by_client: HashMap<IpAddr, usize>,
    /// Those without a request under way, in the order in which they began to wait, and how each is told to leave.
    waiting: BTreeMap<u64, Arc<Notify>>,
    /// How many waits there have been.
    waits: u64,
    warned: Option<Instant>,
}

/// The place of a connection, free again once it is dropped.
pub(super) struct Place {
    places: Arc<Places>,
    /// Whose it is, if that is counted.
    client: Option<IpAddr>,
    leave: Arc<Notify>,
    /// The number of its present wait, or [`WORKING`].
    wait: AtomicU64,
}

const WORKING: u64 = 0;

/// A request that is under way on a connection, until its answer is handed over.
pub(super) struct Work(Arc<Place>);

impl Places {
    pub fn new(max: usize, max_per_client: usize, uncounted: Vec<IpNet>) -> Arc<Self> {
        Arc::new(Self { max, max_per_client, uncounted, taken: Mutex::default() })
    }

    /// A place for a newcomer. If all are taken, whoever has waited longest for a request leaves; `None` if nobody
    /// waits, or if this client has as many as one may have.
    pub fn take(self: &Arc<Self>, peer: IpAddr) -> Option<Arc<Place>> {
        let peer = peer.to_canonical();
        let client = (!self.uncounted.iter().any(|network| network.contains(&peer))).then(|| client(peer));
        let mut taken = self.taken();
        if let Some(client) = &client
            && taken.by_client.get(client).is_some_and(|count| *count >= self.max_per_client)
        {
            taken.warn("a client is refused more connections than ATLUS_MAX_CONNECTIONS_PER_CLIENT allows");
            return None;
        }
        if taken.all >= self.max {
            taken.warn("there are as many connections as ATLUS_MAX_CONNECTIONS allows");
            let (_, leave) = taken.waiting.pop_first()?;
            leave.notify_one();
        }
        taken.all += 1;
        if let Some(client) = client {
            *taken.by_client.entry(client).or_default() += 1;
        }
        let (places, leave) = (self.clone(), Arc::default());
        let place = Arc::new(Place { places, client, leave, wait: AtomicU64::new(WORKING) });
        taken.wait(&place);
        Some(place)
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken {
    fn wait(&mut self, place: &Place) {
        self.waits += 1;
        place.wait.store(self.waits, Ordering::Relaxed);
        self.waiting.insert(self.waits, place.leave.clone());
    }

    /// Under attack this comes thousands of times a second.
    fn warn(&mut self, message: &str) {
        if self.warned.is_none_or(|at| at.elapsed() >= WARNING) {
            self.warned = Some(Instant::now());
            tracing::warn!("{message}");
        }
    }
}

impl Place {
    /// Notes that a request is under way.
    pub fn work(self: &Arc<Self>) -> Work {
        let mut taken = self.places.taken();
        taken.waiting.remove(&self.wait.swap(WORKING, Ordering::Relaxed));
        Work(self.clone())
    }

    /// The number of the present wait for a request, each time another; `None` while one is under way.
    pub fn wait(&self) -> Option<u64> {
        Some(self.wait.load(Ordering::Relaxed)).filter(|wait| *wait != WORKING)
    }

    /// Returns once the place is given to another.
    pub async fn lost(&self) {
        loop {
            self.leave.notified().await;
            // Else a request came at the last moment, and there is one connection too many for so long.
            if self.wait().is_some() {
                return;
            }
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.0.places.taken().wait(&self.0);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        taken.all -= 1;
        taken.waiting.remove(&self.wait.load(Ordering::Relaxed));
        if let Some(client) = self.client
            && let Some(count) = taken.by_client.get_mut(&client)
        {
            *count -= 1;
            if *count == 0 {
                taken.by_client.remove(&client);
            }
        }
    }
}

/// Whom an address stands for: of IPv6, customers have networks of 64 bits.
fn client(peer: IpAddr) -> IpAddr {
    match peer {
        IpAddr::V4(_) => peer,
        IpAddr::V6(peer) => Ipv6Addr::from_bits(peer.to_bits() & (u128::MAX << 64)).into(),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn peer(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn a_newcomer_takes_the_place_of_whoever_has_waited_longest() {
        let places = Places::new(3, 9, Vec::new());
        let [first, second, third] = [1, 2, 3].map(|i| places.take(peer(&format!("10.0.0.{i}"))).unwrap());
        drop(first.work());
        let _busy = second.work();
        let newcomer = places.take(peer("10.0.0.9")).unwrap();
        third.lost().await;
        assert!(first.lost().now_or_never().is_none() && second.lost().now_or_never().is_none());
        drop(third);

        let _other = (places.take(peer("10.0.0.9")).unwrap(), first.lost().await);
        let _busy = (newcomer.work(), first.work());
        assert_eq!(first.lost().now_or_never(), None);
    }

    #[tokio::test]
    async fn nobody_leaves_whose_request_came_first() {
        let places = Places::new(1, 9, Vec::new());
        let first = places.take(peer("10.0.0.1")).unwrap();
        let _newcomer = places.take(peer("10.0.0.2")).unwrap();
        let work = first.work();
        assert_eq!(first.lost().now_or_never(), None);
        drop(work);
        assert_eq!(first.lost().now_or_never(), None);
    }

    #[test]
    fn where_everybody_works_a_newcomer_is_turned_away() {
        let places = Places::new(1, 9, Vec::new());
        let first = places.take(peer("10.0.0.1")).unwrap();
        let work = first.work();
        assert!(places.take(peer("10.0.0.2")).is_none());
        drop((work, first));
        assert!(places.take(peer("10.0.0.2")).is_some());
    }

    #[test]
    fn one_client_cannot_have_all_places() {
        let proxies = vec!["192.168.0.0/16".parse().unwrap()];
        for (one, same, other) in [
            ("10.0.0.1", "::ffff:10.0.0.1", "10.0.0.2"),
            ("2001:db8:1:2::1", "2001:db8:1:2:ffff::", "2001:db8:1:3::1"),
        ] {
            let places = Places::new(9, 1, proxies.clone());
            let place = places.take(peer(one)).unwrap();
            assert!(places.take(peer(same)).is_none(), "{same}");
            assert!(places.take(peer(other)).is_some(), "{other}");
            drop(place);
            assert!(places.take(peer(same)).is_some(), "{same}");
        }
        let places = Places::new(9, 1, proxies);
        let through_a_proxy = [(); 5].map(|()| places.take(peer("192.168.1.1")));
        assert!(through_a_proxy.iter().all(Option::is_some));
    }
}
