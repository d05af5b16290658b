//! Settings on who may call, and how often.

use std::net::SocketAddr;

use clap::Args;

use super::{Problems, given};
use crate::auth::{
    address::TrustedProxies,
    jwt::{JwtSettings, JwtVariables},
    rate::RateLimit,
};

/// The settings as they are given, each as text.
#[derive(Args, Clone, Debug)]
pub(super) struct AccessArgs {
    /// Whether callers must show a key. `required`: all of them (`atlus keys create` makes one); `auto`: not while
    /// listening on a loopback address, and on any other the server refuses to start; `off`: everybody who reaches the
    /// server may read and change everything
    #[arg(long, env = "ATLUS_AUTH", help_heading = "Access", default_value = "auto", hide_env_values = true)]
    auth: String,

    /// Where the issuer of your users' tokens (JWT) publishes its keys, over HTTPS; such tokens are then taken like
    /// keys that are bound to a user
    #[arg(long, env = "ATLUS_JWT_JWKS_URL", help_heading = "Access", hide_env_values = true)]
    jwt_jwks_url: Option<String>,

    /// Instead of that: the public key (PEM) that tokens are signed with, or the path of a file that holds it
    #[arg(long, env = "ATLUS_JWT_KEY", help_heading = "Access", hide_env_values = true)]
    jwt_key: Option<String>,

    /// What tokens must name as their issuer (`iss`)
    #[arg(long, env = "ATLUS_JWT_ISSUER", help_heading = "Access", hide_env_values = true)]
    jwt_issuer: Option<String>,

    /// What tokens must name as their audience (`aud`)
    #[arg(long, env = "ATLUS_JWT_AUDIENCE", help_heading = "Access", hide_env_values = true)]
    jwt_audience: Option<String>,

    /// The claim that names the tenant; unset: all tokens are of the tenant `default`
    #[arg(long, env = "ATLUS_JWT_TENANT_CLAIM", help_heading = "Access", hide_env_values = true)]
    jwt_tenant_claim: Option<String>,

    /// The claim that names the user [default: sub]
    #[arg(long, env = "ATLUS_JWT_USER_CLAIM", help_heading = "Access", hide_env_values = true)]
    jwt_user_claim: Option<String>,

    /// The claim that lists the scopes, `read` and `write`; unset: every token has both. No token has `admin`
    #[arg(long, env = "ATLUS_JWT_SCOPE_CLAIM", help_heading = "Access", hide_env_values = true)]
    jwt_scope_claim: Option<String>,

    /// Calls per time and key, or client address where no key is shown, as `100/60s`; half of it for creating and
    /// deleting sessions; or `off`
    #[arg(
        long,
        env = "ATLUS_RATE_LIMIT",
        help_heading = "Access",
        default_value = "100/60s",
        hide_env_values = true
    )]
    rate_limit: String,

    /// Proxies whose X-Forwarded-For is believed: addresses and networks, with commas between
    #[arg(long, env = "ATLUS_TRUSTED_PROXIES", help_heading = "Access", hide_env_values = true)]
    trusted_proxies: Option<String>,
}

/// Who may call, and how often.
#[derive(Clone, Debug)]
pub struct AccessConfig {
    /// Whether callers must show a key.
    pub required: bool,
    /// The tokens that are taken beside keys.
    pub jwt: Option<JwtSettings>,
    /// Absent: as often as they like.
    pub rate_limit: Option<RateLimit>,
    pub trusted_proxies: TrustedProxies,
}

impl AccessArgs {
    pub(super) fn read(&self, listen: Option<SocketAddr>, problems: &mut Problems) -> AccessConfig {
        let required = self.required(listen, problems);
        let jwt = JwtSettings::check(&JwtVariables {
            jwks_url: self.jwt_jwks_url.as_deref(),
            key: self.jwt_key.as_deref(),
            issuer: self.jwt_issuer.as_deref(),
            audience: self.jwt_audience.as_deref(),
            tenant_claim: self.jwt_tenant_claim.as_deref(),
            user_claim: self.jwt_user_claim.as_deref(),
            scope_claim: self.jwt_scope_claim.as_deref(),
        });
        let jwt = jwt.unwrap_or_else(|wrong| {
            problems.0.extend(wrong);
            None
        });
        if jwt.is_some() && !required {
            let problem = "keys for tokens are set, but callers need none: set ATLUS_AUTH=required too";
            problems.0.push(problem.to_owned());
        }
        let rate_limit = match self.rate_limit.as_str() {
            "off" => None,
            limit => problems.read("ATLUS_RATE_LIMIT", given(Some(&limit.to_owned())).unwrap_or("100/60s")),
        };
        let trusted_proxies = given(self.trusted_proxies.as_ref())
            .and_then(|proxies| problems.read("ATLUS_TRUSTED_PROXIES", proxies));
        AccessConfig { required, jwt, rate_limit, trusted_proxies: trusted_proxies.unwrap_or_default() }
    }

    fn required(&self, listen: Option<SocketAddr>, problems: &mut Problems) -> bool {
        match self.auth.as_str() {
            "required" => return true,
            "off" => {}
            "auto" | "" if listen.is_none_or(|address| address.ip().is_loopback()) => {}
            "auto" | "" => problems.0.push(format!(
                "ATLUS_LISTEN {} can be reached from other machines: set ATLUS_AUTH=required and make a key with \
                 `atlus keys create --name first --scope read,write,admin`, or listen on 127.0.0.1, or set \
                 ATLUS_AUTH=off to let everybody who reaches it read and change everything",
                listen.map(|address| address.to_string()).unwrap_or_default()
            )),
            other => problems.0.push(format!("ATLUS_AUTH must be auto, required or off, not {other:?}")),
        }
        false
    }

    /// The same for a server that serves only the process it is in.
    pub(super) fn unlimited(&mut self) {
        "off".clone_into(&mut self.rate_limit);
        "auto".clone_into(&mut self.auth);
        for unused in [&mut self.jwt_jwks_url, &mut self.jwt_key] {
            *unused = None;
        }
    }
}
