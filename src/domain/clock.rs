//! Time, and the one place that asks for it.

use std::{fmt, ops, time::Duration};

use chrono::{DateTime, SecondsFormat, Utc};

/// A moment: milliseconds since 1970-01-01 UTC.
///
/// A number, not a text or a native type of one database: it sorts exactly, is computed with alike on
/// SQLite and Postgres, and what is answered equals what is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, sqlx::Type, serde::Deserialize)]
#[sqlx(transparent)]
#[serde(try_from = "String")]
pub struct Timestamp(i64);

impl Timestamp {
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    pub const fn as_millis(self) -> i64 {
        self.0
    }

    /// Seconds since 1970-01-01, UTC, to the millisecond.
    #[expect(clippy::cast_precision_loss, reason = "milliseconds of any year to come fit into 52 bits")]
    pub fn as_seconds(self) -> f64 {
        self.0 as f64 / 1000.0
    }

    /// Days since 1970-01-01, UTC.
    pub const fn day(self) -> i64 {
        self.0.div_euclid(DAY)
    }

    /// How long this day, UTC, still lasts.
    pub fn left_of_day(self) -> Duration {
        Duration::from_millis((DAY - self.0.rem_euclid(DAY)).unsigned_abs())
    }
}

/// A day in milliseconds.
const DAY: i64 = 24 * 60 * 60 * 1000;

impl fmt::Display for Timestamp {
    /// RFC 3339, UTC, three digits of a second, `Z`: `2024-01-01T12:00:00.000Z`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = DateTime::<Utc>::from_timestamp_millis(self.0).unwrap_or(DateTime::<Utc>::MAX_UTC);
        f.write_str(&time.to_rfc3339_opts(SecondsFormat::Millis, true))
    }
}

/// From the beginning of the year 0 to the end of the year 9999, in milliseconds.
const YEARS: std::ops::RangeInclusive<i64> = -62_167_219_200_000..=253_402_300_799_999;

impl TryFrom<String> for Timestamp {
    type Error = String;

    /// Reads RFC 3339 with any offset; what is finer than a millisecond is cut off.
    fn try_from(text: String) -> Result<Self, String> {
        let time = DateTime::parse_from_rfc3339(&text);
        // Years of four digits, also in UTC.
        let millis = time.ok().map(|time| time.timestamp_millis()).filter(|millis| YEARS.contains(millis));
        let problem = || "must be a time such as 2024-01-01T12:00:00.000Z (RFC 3339)".to_owned();
        millis.map(Self).ok_or_else(problem)
    }
}

impl ops::Add<Duration> for Timestamp {
    type Output = Self;
    fn add(self, span: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(span.as_millis()).unwrap_or(i64::MAX)))
    }
}

impl ops::Sub<Duration> for Timestamp {
    type Output = Self;
    fn sub(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(span.as_millis()).unwrap_or(i64::MAX)))
    }
}

impl serde::Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Where "now" comes from, so that tests can hold it still.
pub trait Clock: Send + Sync {
    fn now(&self) -> Timestamp;
}

/// This machine's clock.
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    fn now(&self) -> Timestamp {
        Timestamp(Utc::now().timestamp_millis())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_written_with_milliseconds_and_z() {
        assert_eq!(Timestamp(1_704_110_400_000).to_string(), "2024-01-01T12:00:00.000Z");
        assert_eq!(Timestamp(1_704_110_400_007).to_string(), "2024-01-01T12:00:00.007Z");
    }
}
