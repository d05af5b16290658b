-- Sessions that have ended or expired in the orders in which they are listed: among very many that are active there may be
-- few of them.
CREATE INDEX sessions_ended_by_activity ON sessions (tenant_id, temporary, last_activity, session_id)
    WHERE ended_at IS NOT NULL;
CREATE INDEX sessions_ended_by_creation ON sessions (tenant_id, temporary, created_at, session_id)
    WHERE ended_at IS NOT NULL;
CREATE INDEX sessions_expiring_by_activity ON sessions (tenant_id, temporary, last_activity, session_id)
    WHERE ended_at IS NULL AND expires_at IS NOT NULL;
CREATE INDEX sessions_expiring_by_creation ON sessions (tenant_id, temporary, created_at, session_id)
    WHERE ended_at IS NULL AND expires_at IS NOT NULL;
