//! A circuit breaker: a server that keeps failing is left alone for a while.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Failures in a row after which the circuit opens.
const FAILURES: u32 = 5;
/// How long it stays open before one call may try again.
pub(super) const OPEN: Duration = Duration::from_secs(10);

/// Whether a server is worth asking.
#[derive(Default)]
pub(super) struct Circuit(Mutex<State>);

#[derive(Default)]
struct State {
    failures: u32,
    open_until: Option<Instant>,
}

impl Circuit {
    /// Asks to call. Refused, with the time to wait, while the circuit is open; when that time is over one caller
    /// may try, and the others wait for its outcome.
    pub fn admit(&self) -> Result<(), Duration> {
        let (mut state, now) = (self.0.lock().unwrap_or_else(PoisonError::into_inner), Instant::now());
        match state.open_until {
            Some(until) if until > now => Err(until - now),
            Some(_) => {
                state.open_until = Some(now + OPEN);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Tells how a call went: whether the server answered, be it with a refusal.
    pub fn report(&self, answered: bool) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if answered {
            *state = State::default();
            return;
        }
        state.failures = state.failures.saturating_add(1);
        if state.failures >= FAILURES {
            state.open_until = Some(Instant::now() + OPEN);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_opens_after_failures_in_a_row_and_lets_one_call_try_again() {
        let circuit = Circuit::default();
        for _ in 0..FAILURES - 1 {
            circuit.report(false);
        }
        circuit.report(true);
        for _ in 0..FAILURES {
            assert_eq!(circuit.admit(), Ok(()));
            circuit.report(false);
        }
        assert_eq!(circuit.admit(), Err(OPEN));
        tokio::time::advance(OPEN).await;
        assert_eq!(circuit.admit(), Ok(()));
        assert!(circuit.admit().is_err());
        circuit.report(true);
        assert_eq!(circuit.admit(), Ok(()));
    }
}
