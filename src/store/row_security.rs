//! The second wall on Postgres: policies by which the database itself shows and takes only rows of the tenants that a
//! transaction is about, whatever its statements say.
//!
//! A batch of the writer is about several tenants, so the policies read a list, from a setting that lasts as long as
//! the transaction (see [`super::db::Reach`]). Tables with digests only have none: `@@` is not leakproof, so Postgres
//! would not search an index before it had looked at every row's tenant.

use sqlx::{AssertSqlSafe, Executor, PgConnection};

/// The tables whose rows belong to tenants and hold what somebody said, or who somebody is.
const TABLES: [&str; 8] = [
    "sessions", "turns", "turn_pieces", "session_memory", "facts", "idempotency_records", "api_keys",
    "token_uses",
];

/// The setting is read once per statement.
const POLICY: &str = "((SELECT current_setting('atlus.tenants', true) = '*') OR tenant_id = ANY (ARRAY( \
     SELECT unnest(string_to_array(NULLIF(current_setting('atlus.tenants', true), '*'), ','))::bigint)))";

/// Puts the policies on, for the tables' owner too; nothing changes where they are already.
pub(super) async fn enable(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    connection.execute("BEGIN").await?;
    // One instance at a time, and in an order in which none waits for another in a circle.
    connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('atlus row security', 0))").await?;
    for table in TABLES {
        let known = "SELECT 1 FROM pg_policies WHERE schemaname = current_schema() AND tablename = $1 \
             AND policyname = 'atlus_tenants'";
        let known = sqlx::query(known).bind(table).fetch_optional(&mut *connection).await?;
        if known.is_none() {
            let enable = format!(
                "CREATE POLICY atlus_tenants ON {table} USING {POLICY}; \
                 ALTER TABLE {table} ENABLE ROW LEVEL SECURITY; ALTER TABLE {table} FORCE ROW LEVEL SECURITY"
            );
            connection.execute(AssertSqlSafe(enable)).await?;
        }
    }
    connection.execute("COMMIT").await?;
    Ok(())
}
