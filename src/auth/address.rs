//! Where a call comes from, if proxies stand between.

use std::{
    net::{IpAddr, SocketAddr},
    str::{self, FromStr},
};

use ipnet::IpNet;

/// Proxies whose word is taken on where a call comes from; none by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustedProxies(Vec<IpNet>);

impl TrustedProxies {
    pub fn networks(&self) -> &[IpNet] {
        &self.0
    }

    fn include(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }
}

impl FromStr for TrustedProxies {
    type Err = String;

    /// Reads addresses and networks with commas between; fails with a sentence on what to mend.
    fn from_str(text: &str) -> Result<Self, String> {
        let network = |item: &str| {
            let address = || item.parse().map(|address: IpAddr| IpNet::from(address.to_canonical()));
            item.parse().or_else(|_| address()).map_err(|_| {
                format!("must be addresses and networks with commas between (10.0.0.0/8, ::1), not {item:?}")
            })
        };
        text.split(',').map(|item| network(item.trim())).collect::<Result<_, _>>().map(Self)
    }
}

/// The address that a call comes from: of the hops that the `X-Forwarded-For` headers name, from the last to the first,
/// the first that is not a trusted proxy; the connection's own `peer` unless that is one. What lies behind an entry that
/// is no address is not looked at, since only trusted proxies write addresses for sure.
///
/// IPv4 addresses within IPv6 are given as IPv4.
pub fn client_address<'a>(
    peer: IpAddr,
    forwarded_for: impl DoubleEndedIterator<Item = &'a [u8]>,
    trusted: &TrustedProxies,
) -> IpAddr {
    let entries = forwarded_for.rev().flat_map(|value| value.rsplit(|byte| *byte == b','));
    let mut hops = entries.map_while(address);
    let mut client = peer.to_canonical();
    while trusted.include(client) {
        let Some(hop) = hops.next() else { break };
        client = hop;
    }
    client
}

/// Reads an address, which may stand in brackets and have a port.
fn address(entry: &[u8]) -> Option<IpAddr> {
    let text = str::from_utf8(entry).ok()?.trim();
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse().or_else(|_| text.parse().map(|socket: SocketAddr| socket.ip()));
    address.ok().map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The client of a call that came from `peer` with these headers, where 10.0.0.0/8 and ::1 are trusted.
    fn client(peer: &str, headers: &[&str]) -> String {
        let trusted = "10.0.0.0/8, ::1".parse().unwrap();
        let headers = headers.iter().map(|header| header.as_bytes());
        client_address(peer.parse().unwrap(), headers, &trusted).to_string()
    }

    #[test]
    fn a_stranger_cannot_claim_another_address() {
        assert_eq!(client("203.0.113.9", &["198.51.100.1"]), "203.0.113.9");
        assert_eq!(client("203.0.113.9", &["198.51.100.1, 10.0.0.1"]), "203.0.113.9");
    }

    #[test]
    fn without_proxies_nobody_is_believed() {
        let headers = [&b"198.51.100.1"[..]].into_iter();
        let peer = "127.0.0.1".parse().unwrap();
        assert_eq!(client_address(peer, headers, &TrustedProxies::default()), peer);
    }

    #[test]
    fn what_a_client_wrote_before_a_proxy_did_is_not_believed() {
        assert_eq!(client("10.0.0.1", &["198.51.100.1, 203.0.113.9"]), "203.0.113.9");
        assert_eq!(client("10.0.0.1", &["10.9.9.9, 203.0.113.9, 10.0.0.2"]), "203.0.113.9");
    }

    #[test]
    fn several_headers_are_one_list() {
        assert_eq!(client("10.0.0.1", &["198.51.100.1", "203.0.113.9", "10.0.0.3,10.0.0.2"]), "203.0.113.9");
    }

    #[test]
    fn a_call_of_a_proxy_itself_is_the_proxys() {
        assert_eq!(client("10.0.0.1", &[]), "10.0.0.1");
        assert_eq!(client("10.0.0.1", &["10.0.0.3, 10.0.0.2"]), "10.0.0.3");
    }

    #[test]
    fn ports_and_brackets_are_read() {
        for (entry, address) in [
            ("203.0.113.9:4711", "203.0.113.9"),
            ("2001:db8::1", "2001:db8::1"),
            ("[2001:db8::1]", "2001:db8::1"),
            ("[2001:db8::1]:4711", "2001:db8::1"),
            ("\t203.0.113.9 ", "203.0.113.9"),
        ] {
            assert_eq!(client("::1", &[entry]), address, "{entry}");
        }
    }

    #[test]
    fn an_ipv4_address_within_ipv6_is_the_ipv4_address() {
        assert_eq!(client("::ffff:10.0.0.1", &["::ffff:203.0.113.9"]), "203.0.113.9");
        let trusted: TrustedProxies = "::ffff:10.0.0.1".parse().unwrap();
        assert!(trusted.include("10.0.0.1".parse().unwrap()));
    }

    #[test]
    fn behind_an_entry_that_is_no_address_nothing_is_believed() {
        for garbage in
            ["", "unknown", "_hidden", "203.0.113.9.1", "203.0.113.9:", "[::1", "ä", "a b", "1.2.3.4;"]
        {
            assert_eq!(client("10.0.0.1", &["203.0.113.9", garbage]), "10.0.0.1", "{garbage}");
            let list = format!("203.0.113.9, {garbage}, 10.0.0.2");
            assert_eq!(client("10.0.0.1", &[&list]), "10.0.0.2", "{list}");
        }
        let not_text = [&b"203.0.113.9"[..], &b"\xff"[..]].into_iter();
        let trusted = "10.0.0.1".parse().unwrap();
        assert_eq!(client_address("10.0.0.1".parse().unwrap(), not_text, &trusted).to_string(), "10.0.0.1");
    }

    #[test]
    fn a_list_that_does_not_parse_says_what_to_mend() {
        for wrong in ["", "10.0.0.0/33", "10.0.0.1,", "proxy.example", "10.0.0.1 10.0.0.2"] {
            let problem = wrong.parse::<TrustedProxies>().unwrap_err();
            assert!(problem.starts_with("must be addresses and networks"), "{problem}");
        }
    }
}
