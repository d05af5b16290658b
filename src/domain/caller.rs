//! On whose behalf a request is made.

/// A tenant's number in the database; a condition of every query.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, sqlx::Type)]
#[sqlx(transparent)]
pub struct TenantId(i64);

impl TenantId {
    /// The tenant `default`, to whom everything belongs while authentication is off. The first migration makes it.
    pub const DEFAULT: Self = Self(1);

    /// The number.
    pub fn number(self) -> i64 {
        self.0
    }
}

/// Who asks. The store answers no question without one, so that what is not the caller's is not found.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    pub tenant: TenantId,
}

impl Caller {
    /// Whoever asks while authentication is off.
    pub const ANYONE: Self = Self { tenant: TenantId::DEFAULT };
}
