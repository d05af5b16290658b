//! Tenants at rest.

use super::{Result, Store};
use crate::domain::{caller::TenantId, clock::Timestamp};

impl Store {
    /// Every tenant and its name.
    pub async fn tenants(&self) -> Result<Vec<(TenantId, String)>> {
        Ok(self.db.read("SELECT tenant_id, name FROM tenants ORDER BY tenant_id").all().await?)
    }

    /// The tenant of this name, which is made where there is none.
    pub async fn tenant_named(&self, name: &str, now: Timestamp) -> Result<TenantId> {
        let mut tx = self.db.begin().await?;
        tx.sql(
            "INSERT INTO tenants (tenant_id, name, created_at) \
             SELECT COALESCE(MAX(tenant_id), 0) + 1, $1, $2 FROM tenants WHERE true \
             ON CONFLICT (name) DO NOTHING",
        )
        .bind(name)
        .bind(now)
        .run()
        .await?;
        let (tenant,) = tx.sql("SELECT tenant_id FROM tenants WHERE name = $1").bind(name).one().await?;
        tx.commit().await?;
        Ok(tenant)
    }
}
