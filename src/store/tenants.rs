//! Tenants at rest.

use super::{Result, Store, db::Reach};
use crate::domain::{
    caller::{Caller, TenantId},
    clock::Timestamp,
};

impl Store {
    /// Every tenant and its name.
    pub async fn tenants(&self) -> Result<Vec<(TenantId, String)>> {
        Ok(self
            .db
            .read(Reach::Everybody, "SELECT tenant_id, name FROM tenants ORDER BY tenant_id")
            .all()
            .await?)
    }

    /// What the caller's tenant is called.
    pub async fn tenant_name(&self, caller: &Caller) -> Result<String> {
        let name = self.db.read(caller, "SELECT name FROM tenants WHERE tenant_id = $1");
        let (name,) = name.bind(caller.tenant).one().await?;
        Ok(name)
    }

    /// The tenant of this name, which is made where there is none.
    pub async fn tenant_named(&self, name: &str, now: Timestamp) -> Result<TenantId> {
        let mut tx = self.db.begin(Reach::Everybody).await?;
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
