//! Keeps web pages out where callers need no key.
//!
//! A page may have its own name point to this machine (DNS rebinding); the browser then takes this server for the
//! page's own, but its `Host` is the page's. And it may send a write that it cannot read the answer of; its `Origin`
//! is then the page's. Other clients send no `Origin`, and where keys are needed, a page has none.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use poem::{
    Request, Result,
    http::{HeaderMap, HeaderValue, Method, Version, header},
};

use crate::api::error::{ApiError, Code};

/// Whom a browser may bring here.
#[derive(Clone, Debug)]
pub struct Gate {
    /// Whether callers need no key.
    pub open: bool,
    pub hosts: Hosts,
    pub origins: Origins,
}

/// Names under which the server may be called without keys, besides `localhost` and loopback addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosts {
    any: bool,
    named: Vec<Authority>,
}

/// Origins other than the server's own whose pages may use it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins {
    /// Whether all may.
    pub any: bool,
    named: Vec<Origin>,
}

/// Where health is asked for, by probes that come by address, and what tells nothing but how to use the server.
const PUBLIC: [&str; 7] =
    ["/livez", "/readyz", "/api/v1/health", "/docs", "/api/v1/docs", "/openapi.json", "/openapi.yaml"];

impl Gate {
    /// Refuses a request that a page of others may have sent.
    pub fn check(&self, request: &Request) -> Result<(), ApiError> {
        let host = host(request)?;
        if !self.open || PUBLIC.contains(&request.uri().path()) {
            return Ok(());
        }
        let host: Authority = host.and_then(read).ok_or_else(foreign_host)?;
        // A target with a host of its own counts before the header.
        let target = match request.uri().authority() {
            Some(target) => target.as_str().parse().map_err(|_| foreign_host())?,
            None => host.clone(),
        };
        if !self.hosts.include(&host) || !self.hosts.include(&target) {
            return Err(foreign_host());
        }
        if matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS) {
            return Ok(());
        }
        match Origins::of(request.headers()) {
            None => Ok(()),
            Some(origin) if self.origins.include(origin) => Ok(()),
            Some(origin) if read::<Origin>(origin).is_some_and(|origin| origin.is_at(&host)) => Ok(()),
            Some(_) => Err(foreign_origin()),
        }
    }
}

/// The `Host` of a request, which there must be once (RFC 9112, 3.2); in HTTP/1.0 there need not be any.
fn host(request: &Request) -> Result<Option<&HeaderValue>, ApiError> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() || host.is_none() && request.version() >= Version::HTTP_11 {
        return Err(ApiError::not_one_host());
    }
    Ok(host)
}

fn foreign_host() -> ApiError {
    let message = "Without keys, this server answers only as localhost or by a loopback address; \
                   ATLUS_ALLOWED_HOSTS names other hosts";
    ApiError::new(Code::Forbidden, message)
}

fn foreign_origin() -> ApiError {
    let message = "Without keys, pages of other origins cannot change anything here; \
                   ATLUS_CORS_ORIGINS names origins that may";
    ApiError::new(Code::Forbidden, message)
}

impl Hosts {
    fn include(&self, host: &Authority) -> bool {
        let named =
            |name: &Authority| name.host == host.host && (name.port.is_none() || name.port == host.port);
        self.any || host.is_loopback() || self.named.iter().any(named)
    }
}

impl FromStr for Hosts {
    type Err = String;

    /// Reads names with commas between, each with a port or without; `*` is any.
    fn from_str(text: &str) -> Result<Self, String> {
        let (any, named) = list(text)
            .map_err(|name| format!("must be host names with commas between, or *; {name:?} is none"))?;
        Ok(Self { any, named })
    }
}

impl Origins {
    /// Whether pages of no origin but the server's own may use it.
    pub fn is_empty(&self) -> bool {
        !self.any && self.named.is_empty()
    }

    pub fn include(&self, origin: &HeaderValue) -> bool {
        self.any || read(origin).is_some_and(|origin| self.named.contains(&origin))
    }

    /// The `Origin` of a request; of several, one that is none.
    pub fn of(headers: &HeaderMap) -> Option<&HeaderValue> {
        static NONE: HeaderValue = HeaderValue::from_static("null");
        let mut origins = headers.get_all(header::ORIGIN).iter();
        let origin = origins.next()?;
        Some(if origins.next().is_some() { &NONE } else { origin })
    }
}

impl FromStr for Origins {
    type Err = String;

    /// Reads origins with commas between; `*` is any.
    fn from_str(text: &str) -> Result<Self, String> {
        let (any, named) = list(text).map_err(|origin| {
            format!(
                "must be origins such as https://app.example.com with commas between, or *; {origin:?} is none"
            )
        })?;
        Ok(Self { any, named })
    }
}

/// Reads a list, and whether `*` is in it; fails with what does not fit.
fn list<T: FromStr>(text: &str) -> Result<(bool, Vec<T>), &str> {
    let items = || text.split(',').map(str::trim);
    let named = items().filter(|item| *item != "*").map(|item| item.parse().map_err(|_| item));
    Ok((items().any(|item| item == "*"), named.collect::<Result<_, _>>()?))
}

fn read<T: FromStr>(value: &HeaderValue) -> Option<T> {
    value.to_str().ok()?.parse().ok()
}

/// A host, and a port unless it is left out: RFC 3986's authority, without user information.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Authority {
    host: Host,
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    Address(IpAddr),
    /// In lower case, and without a dot at its end.
    Name(String),
}

/// It is none.
struct Unreadable;

impl Authority {
    fn is_loopback(&self) -> bool {
        match &self.host {
            Host::Address(address) => address.is_loopback(),
            Host::Name(name) => name == "localhost",
        }
    }
}

impl FromStr for Authority {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Unreadable> {
        let end = if text.starts_with('[') { text.find(']').map(|end| end + 1) } else { text.find(':') };
        let (host, port) = text.split_at(end.unwrap_or(text.len()));
        let port = match port.strip_prefix(':') {
            None if port.is_empty() => None,
            Some("") => None,
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(digits.parse().map_err(|_| Unreadable)?)
            }
            _ => return Err(Unreadable),
        };
        Ok(Self { host: host.parse()?, port })
    }
}

impl FromStr for Host {
    type Err = Unreadable;

    /// What only some readers take for an address (`127.1`, `0x7f.1`) is a name here, and nobody's.
    fn from_str(text: &str) -> Result<Self, Unreadable> {
        if let Some(address) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            let address: Ipv6Addr = address.parse().map_err(|_| Unreadable)?;
            return Ok(Self::Address(address.to_canonical()));
        }
        let name = text.strip_suffix('.').unwrap_or(text);
        if let Ok(address) = name.parse::<Ipv4Addr>() {
            return Ok(Self::Address(address.into()));
        }
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        match !name.is_empty() && name.bytes().all(fits) {
            true => Ok(Self::Name(name.to_ascii_lowercase())),
            false => Err(Unreadable),
        }
    }
}

/// Where a page comes from: RFC 6454.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Origin {
    scheme: String,
    authority: Authority,
}

impl Origin {
    /// Whether a page of this origin is of the server that is called so. What stands before the server may speak
    /// another scheme than it does.
    fn is_at(&self, host: &Authority) -> bool {
        let default = default_port(&self.scheme);
        default.is_some() && self.authority == Authority { port: host.port.or(default), ..host.clone() }
    }
}

impl FromStr for Origin {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Unreadable> {
        let (scheme, authority) = text.split_once("://").ok_or(Unreadable)?;
        let scheme = scheme.to_ascii_lowercase();
        let Authority { host, port } = authority.parse()?;
        let port = port.or(default_port(&scheme));
        Ok(Self { scheme, authority: Authority { host, port } })
    }
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}
