//! How many files may be open: each connection is one.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Sees to it that `wanted` files may be open, as far as the system lets a process do that for itself; how many may
/// be. The usual limit of 1,024 protects programs that use `select`, and ours does not.
pub fn allow_open_files(wanted: u64) -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // Without a number there is no limit.
    let (allowed, most) = (current.unwrap_or(u64::MAX), maximum.unwrap_or(u64::MAX));
    let raised = wanted.min(most);
    if raised <= allowed || setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum }).is_err() {
        return allowed;
    }
    tracing::info!("the limit of open files is now {raised}; it was {allowed}");
    raised
}
