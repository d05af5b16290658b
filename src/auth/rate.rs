//! How many calls a client may make in a window of time.
//!
//! A window has a fixed length and begins with a client's first call, so that around the end of one up to twice the
//! limit may pass in a shorter time.
//!
//! On SQLite each process counts for itself, in memory. On Postgres the window is in the database: an instance takes a
//! tenth of what is left there, serves calls out of that, and asks again when it is used up. So all instances together
//! never let more than the limit pass. They let less pass if one of them is not asked for what it took: by a tenth of
//! the limit for each such instance, at most. While the database fails, each instance counts for itself.

use std::{
    collections::HashMap,
    fmt, mem,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Mutex as Line, Semaphore},
    time::Instant,
};

use crate::{
    domain::{caller::TenantId, ids::digest},
    store::{Kind, Share, Store},
};

/// Buckets that are counted at once; beyond them those of longest ago are forgotten, and their clients begin anew.
const MOST_BUCKETS: usize = 100_000;
/// An instance takes one of so many parts of what is left.
const PARTS: u32 = 10;
/// Shares taken at once, so that a crowd of new clients leaves connections to those who write.
const TAKEN_AT_ONCE: usize = 2;
/// How long a database that failed is left alone.
const RETRY: Duration = Duration::from_secs(1);

/// So many calls in a window of so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// 1 to 1,000,000.
    pub requests: u32,
    /// Whole seconds, 1 s to 24 h.
    pub window: Duration,
}

impl FromStr for RateLimit {
    type Err = String;

    /// Reads `100/60s`; fails with a sentence on what to mend.
    fn from_str(text: &str) -> Result<Self, String> {
        let read = || {
            let (requests, window) = text.split_once('/')?;
            let requests = requests.parse().ok().filter(|requests| (1..=1_000_000).contains(requests))?;
            let window = humantime::parse_duration(window).ok()?;
            let is_fit = window.subsec_nanos() == 0 && (1..=24 * 60 * 60).contains(&window.as_secs());
            is_fit.then_some(Self { requests, window })
        };
        let problem = "must be 1 to 1000000 calls in a time of 1s to 24h, in whole seconds, such as 100/60s";
        read().ok_or_else(|| format!("{problem}, not {text:?}"))
    }
}

impl fmt::Display for RateLimit {
    /// As `RateLimit-Policy` has it: `100;w=60`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{};w={}", self.requests, self.window.as_secs())
    }
}

/// Which calls count together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    Default,
    /// Those that create or delete sessions: half the limit, apart from the rest.
    Sessions,
}

/// Who calls, as far as counting goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client<'a> {
    /// By the number of a key.
    Key(i64),
    /// By a token for a user of a tenant.
    User(TenantId, &'a str),
    /// By nothing but an address. Those of one IPv6 network (/64) are one client, since that is what one is given.
    Address(IpAddr),
}

impl Client<'_> {
    /// A number for the calls of this client that count together under this limit.
    fn bucket(self, class: Class, limit: RateLimit) -> i64 {
        let class = match class {
            Class::Default => "default",
            Class::Sessions => "sessions",
        };
        let (kind, who) = match self {
            Self::Key(id) => ("key", id.to_string()),
            Self::User(tenant, user) => ("user", format!("{} {user}", tenant.number())),
            Self::Address(address) => ("address", network(address).to_string()),
        };
        // Another limit is another window: what was counted by the one means nothing to the other.
        digest(&[class, &limit.to_string(), kind, &who])
    }
}

/// The first address of an IPv6 address's /64; any other as it is.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address @ IpAddr::V4(_) => address,
    }
}

/// What became of a call, and of its client's window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    pub allowed: bool,
    /// The limit of the call's class.
    pub limit: RateLimit,
    /// Calls left in the window, as far as this instance knows.
    pub remaining: u32,
    /// When the window ends.
    pub resets_in: Duration,
    /// Whether it is the first of the window that this instance refuses.
    pub is_first_refused: bool,
}

impl Taken {
    /// [`Taken::resets_in`] in whole seconds, rounded up.
    pub fn resets_in_seconds(&self) -> u64 {
        self.resets_in.as_secs() + u64::from(self.resets_in.subsec_nanos() > 0)
    }

    /// The headers that tell a client.
    pub fn headers(&self) -> [(&'static str, String); 4] {
        [
            ("RateLimit-Limit", self.limit.requests.to_string()),
            ("RateLimit-Remaining", self.remaining.to_string()),
            ("RateLimit-Reset", self.resets_in_seconds().to_string()),
            ("RateLimit-Policy", self.limit.to_string()),
        ]
    }
}

/// Counts calls.
pub struct Limiter {
    limit: RateLimit,
    windows: Mutex<Windows>,
    /// Absent where each process counts for itself.
    shared: Option<Arc<Shared>>,
}

impl Limiter {
    /// Counts in the database if that is Postgres, else in memory.
    pub fn new(limit: RateLimit, store: &Store) -> Self {
        let shared = (store.kind() == Kind::Postgres).then(|| Arc::new(Shared::new(store.clone())));
        Self { limit, windows: Mutex::default(), shared }
    }

    /// Counts a call and tells whether it may pass. Never fails: without the database this instance counts for itself.
    pub async fn take(&self, class: Class, client: Client<'_>) -> Taken {
        let limit = self.limit_of(class);
        let bucket = client.bucket(class, limit);
        let window = lock(&self.windows).of(bucket, limit);
        // Calls of one client wait while one of them asks the database; those of others do not.
        let mut window = window.lock().await;
        let now = Instant::now();
        if window.ends_at <= now {
            *window = Window::new(limit, now);
        }
        if window.own == 0 && window.rest > 0 {
            *window = self.next_share(*window, bucket, limit).await;
        }
        let allowed = window.own > 0;
        let is_first_refused = !allowed && !mem::replace(&mut window.refused, !allowed);
        window.own = window.own.saturating_sub(1);
        let resets_in = window.ends_at.saturating_duration_since(Instant::now());
        Taken { allowed, limit, remaining: window.own + window.rest, resets_in, is_first_refused }
    }

    fn limit_of(&self, class: Class) -> RateLimit {
        match class {
            Class::Default => self.limit,
            Class::Sessions => RateLimit { requests: self.limit.requests.div_ceil(2), ..self.limit },
        }
    }

    /// A window whose share is used up, with another.
    async fn next_share(&self, window: Window, bucket: i64, limit: RateLimit) -> Window {
        let share = window.rest.div_ceil(PARTS);
        // Reckoned from before it is asked, a window ends here no later than in the database.
        let asked_at = Instant::now();
        let taken = match &self.shared {
            // In a task of its own: a client that goes away would break off the connection to the database.
            Some(shared) => tokio::spawn(shared.clone().take(bucket, share, limit)).await.ok().flatten(),
            None => None,
        };
        match taken {
            Some(Share { got, rest, ends_in }) => {
                Window { own: got, rest, ends_at: asked_at + ends_in, ..window }
            }
            None => Window { own: share, rest: window.rest - share, ..window },
        }
    }
}

/// A client's window, as an instance sees it.
#[derive(Clone, Copy, Debug)]
struct Window {
    ends_at: Instant,
    /// Calls that this instance may let pass.
    own: u32,
    /// Calls that are left to all instances beside those.
    rest: u32,
    /// Whether a call was refused.
    refused: bool,
}

impl Window {
    fn new(limit: RateLimit, now: Instant) -> Self {
        Self { ends_at: now + limit.window, own: 0, rest: limit.requests, refused: false }
    }
}

/// The windows of all buckets, in two generations. The elder goes when the younger is as old as a window, or holds half
/// of all that may be: then every window in it is over, or there are too many. A cache that forgets rare entries first
/// would let new clients pass uncounted, and one with a clock of its own might forget a window before its end.
struct Windows {
    young: HashMap<i64, Arc<Line<Window>>>,
    old: HashMap<i64, Arc<Line<Window>>>,
    since: Instant,
}

impl Default for Windows {
    fn default() -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), since: Instant::now() }
    }
}

impl Windows {
    /// The window of a bucket, where there is none a new one.
    fn of(&mut self, bucket: i64, limit: RateLimit) -> Arc<Line<Window>> {
        let now = Instant::now();
        if now >= self.since + limit.window || self.young.len() >= MOST_BUCKETS / 2 {
            self.old = mem::take(&mut self.young);
            self.since = now;
        }
        let new = || Arc::new(Line::new(Window::new(limit, now)));
        let window = self.young.entry(bucket).or_insert_with(|| self.old.remove(&bucket).unwrap_or_else(new));
        Arc::clone(window)
    }
}

/// The windows in the database.
struct Shared {
    store: Store,
    asking: Semaphore,
    /// When to ask again a database that failed.
    away: Mutex<Option<Instant>>,
}

impl Shared {
    fn new(store: Store) -> Self {
        Self { store, asking: Semaphore::new(TAKEN_AT_ONCE), away: Mutex::default() }
    }

    /// Takes a share; `None` while the database does not answer.
    async fn take(self: Arc<Self>, bucket: i64, share: u32, limit: RateLimit) -> Option<Share> {
        let _place = self.asking.acquire().await.ok()?;
        if !self.is_worth_asking() {
            return None;
        }
        let taken = self.store.take_share(bucket, share, limit.requests, limit.window).await;
        let mut away = lock(&self.away);
        match &taken {
            Ok(_) if away.take().is_some() => tracing::info!("calls are counted by all instances again"),
            Ok(_) => {}
            Err(error) => {
                if away.replace(Instant::now() + RETRY).is_none() {
                    let error = error as &dyn std::error::Error;
                    tracing::warn!(
                        error,
                        "calls are counted by each instance for itself: the database failed"
                    );
                }
            }
        }
        taken.ok()
    }

    /// Not soon after a failure, and then by one call first.
    fn is_worth_asking(&self) -> bool {
        let (mut away, now) = (lock(&self.away), Instant::now());
        match *away {
            Some(until) if until > now => false,
            Some(_) => {
                *away = Some(now + RETRY);
                true
            }
            None => true,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: RateLimit = RateLimit { requests: 100, window: Duration::from_secs(60) };

    /// One that counts for itself.
    fn limiter(limit: RateLimit) -> Limiter {
        Limiter { limit, windows: Mutex::default(), shared: None }
    }

    /// How many of `calls` calls pass.
    async fn passed(limiter: &Limiter, class: Class, client: Client<'_>, calls: u32) -> u32 {
        let mut passed = 0;
        for _ in 0..calls {
            passed += u32::from(limiter.take(class, client).await.allowed);
        }
        passed
    }

    #[test]
    fn a_limit_is_read_in_calls_and_time() {
        for (text, requests, seconds) in
            [("100/60s", 100, 60), ("1/1s", 1, 1), ("1000000/24h", 1_000_000, 86_400)]
        {
            let limit = RateLimit { requests, window: Duration::from_secs(seconds) };
            assert_eq!(text.parse(), Ok(limit), "{text}");
        }
        let wrong = [
            "", "100", "100/", "/60s", "0/60s", "-1/60s", "1000001/60s", "100/0s", "100/500ms", "100/1500ms",
            "100/25h", "100/60", "100/60s/1", "1.5/60s", "many/60s",
        ];
        for text in wrong {
            let problem = text.parse::<RateLimit>().unwrap_err();
            assert!(problem.contains("such as 100/60s"), "{problem}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_begins_with_the_first_call_and_lets_the_limit_pass() {
        let limiter = limiter(LIMIT);
        tokio::time::advance(Duration::from_secs(45)).await;
        assert_eq!(passed(&limiter, Class::Default, Client::Key(1), 60).await, 60);
        tokio::time::advance(Duration::from_secs(59)).await;
        assert_eq!(passed(&limiter, Class::Default, Client::Key(1), 60).await, 40);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(passed(&limiter, Class::Default, Client::Key(1), 300).await, 100);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_is_told_what_is_left_and_when_the_window_ends() {
        let limiter = limiter(RateLimit { requests: 2, ..LIMIT });
        let mut told = Vec::new();
        for _ in 0..3 {
            let taken = limiter.take(Class::Default, Client::Key(1)).await;
            told.push((taken.allowed, taken.remaining, taken.resets_in.as_secs()));
            tokio::time::advance(Duration::from_secs(10)).await;
        }
        assert_eq!(told, [(true, 1, 60), (true, 0, 50), (false, 0, 40)]);
    }

    #[tokio::test]
    async fn creating_and_deleting_sessions_has_half_the_limit_apart_from_the_rest() {
        for (requests, half) in [(100, 50), (5, 3), (1, 1)] {
            let limiter = limiter(RateLimit { requests, ..LIMIT });
            assert_eq!(passed(&limiter, Class::Default, Client::Key(1), 300).await, requests);
            assert_eq!(passed(&limiter, Class::Sessions, Client::Key(1), 300).await, half);
        }
    }

    #[tokio::test]
    async fn clients_are_counted_apart() {
        let (limiter, tenant) = (limiter(RateLimit { requests: 1, ..LIMIT }), TenantId::DEFAULT);
        let clients = [
            Client::Key(1),
            Client::Key(2),
            Client::User(tenant, "1"),
            Client::User(tenant, "ann"),
            Client::Address([192, 0, 2, 1].into()),
            Client::Address([192, 0, 2, 2].into()),
        ];
        for client in clients {
            assert_eq!(passed(&limiter, Class::Default, client, 2).await, 1, "{client:?}");
        }
    }

    #[tokio::test]
    async fn an_ipv6_network_is_one_client_and_ipv4_within_ipv6_is_ipv4() {
        let limiter = limiter(RateLimit { requests: 1, ..LIMIT });
        for (address, allowed) in [
            ("2001:db8:0:1::1", true),
            ("2001:db8:0:1:ffff::2", false),
            ("2001:db8:0:2::1", true),
            ("192.0.2.1", true),
            ("::ffff:192.0.2.1", false),
            ("::ffff:192.0.2.2", true),
        ] {
            let client = Client::Address(address.parse().unwrap());
            assert_eq!(limiter.take(Class::Default, client).await.allowed, allowed, "{address}");
        }
    }

    #[test]
    fn headers_round_seconds_up() {
        let resets_in = Duration::from_millis(59_001);
        let taken = Taken { allowed: true, limit: LIMIT, remaining: 7, resets_in, is_first_refused: false };
        let headers = taken.headers().map(|(name, value)| format!("{name}: {value}"));
        assert_eq!(
            headers,
            [
                "RateLimit-Limit: 100", "RateLimit-Remaining: 7", "RateLimit-Reset: 60",
                "RateLimit-Policy: 100;w=60",
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_is_forgotten_once_it_is_over_and_not_before() {
        let (mut windows, mut used) = (Windows::default(), 0);
        for second in 0..300 {
            let window = windows.of(1, LIMIT);
            let mut window = window.lock().await;
            if window.ends_at <= Instant::now() {
                *window = Window::new(LIMIT, Instant::now());
                used = 0;
            }
            assert_eq!(window.rest, LIMIT.requests - used, "at {second} s");
            window.rest -= 1;
            used += 1;
            windows.of(1000 + second, LIMIT);
            assert!(windows.young.len() + windows.old.len() <= 122);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
    }

    #[tokio::test]
    async fn a_crowd_of_clients_takes_bounded_memory_and_those_who_call_on_are_counted_on() {
        let mut windows = Windows::default();
        for stranger in 1..=3 * i64::try_from(MOST_BUCKETS).unwrap() {
            if stranger % 1000 == 0 {
                windows.of(0, LIMIT).lock().await.own += 1;
            }
            windows.of(stranger, LIMIT);
            assert!(windows.young.len() + windows.old.len() <= MOST_BUCKETS);
        }
        assert_eq!(windows.of(0, LIMIT).lock().await.own, 300);
    }
}
