//! One question to a running server.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use anyhow::Context;
use hyper::{Request, StatusCode, client::conn::http1::handshake, header::HOST};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

/// Where a server that listens at an address is reached from its own machine.
pub fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

/// Asks for `path`; the status of the answer. Needs no certificates and heeds no proxy: the server is on this machine.
pub async fn ask(address: SocketAddr, path: &'static str, patience: Duration) -> anyhow::Result<StatusCode> {
    let exchange = async {
        let (mut server, connection) = handshake(TokioIo::new(TcpStream::connect(address).await?)).await?;
        tokio::spawn(connection);
        let request = Request::get(path).header(HOST, "localhost").body(String::new())?;
        Ok(server.send_request(request).await?.status())
    };
    timeout(patience, exchange).await.with_context(|| format!("no answer within {patience:?}"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_listens_everywhere_is_reached_by_loopback() {
        for (listen, reached) in [
            ("0.0.0.0:5000", "127.0.0.1:5000"),
            ("[::]:5000", "[::1]:5000"),
            ("192.0.2.1:5000", "192.0.2.1:5000"),
        ] {
            assert_eq!(reachable(listen.parse().unwrap()).to_string(), reached);
        }
    }
}
