//! On whose behalf a request is made.

use super::{
    key::{KeyId, Scopes},
    session::UserId,
};

/// A tenant's number in the database; a condition of every query.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, sqlx::Type)]
#[sqlx(transparent)]
pub struct TenantId(i64);

impl TenantId {
    /// The tenant `default`, to whom everything belongs while authentication is off. The first migration makes it.
    pub const DEFAULT: Self = Self(1);

    pub fn from_number(number: i64) -> Self {
        Self(number)
    }

    /// The number.
    pub fn number(self) -> i64 {
        self.0
    }
}

/// Who asks. The store answers no question without one, so that what is not the caller's is not found.
#[derive(Clone, Debug)]
pub struct Caller {
    pub tenant: TenantId,
    /// The only user whose data the caller may see and change, if it is bound to one.
    pub user: Option<UserId>,
    pub scopes: Scopes,
    /// The key it has shown, if it is one of ours.
    pub key: Option<KeyId>,
}

impl Caller {
    /// Whoever asks while authentication is off.
    pub const ANYONE: Self = Self::of(TenantId::DEFAULT);

    /// Somebody who may do everything in a tenant.
    pub const fn of(tenant: TenantId) -> Self {
        Self { tenant, user: None, scopes: Scopes::ALL, key: None }
    }

    /// Whether it may see and change what is this user's.
    pub fn may_see(&self, user: &UserId) -> bool {
        self.user.as_ref().is_none_or(|own| own == user)
    }
}
