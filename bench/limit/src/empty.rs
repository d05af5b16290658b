//! An empty handler of poem-openapi: what a request costs before anything is done for it.

use poem::{
    Route, Server,
    listener::{Acceptor, Listener, TcpListener},
};
use poem_openapi::{OpenApi, OpenApiService, payload::PlainText};

struct Empty;

#[OpenApi]
impl Empty {
    /// Answer nothing
    #[oai(path = "/empty", method = "get")]
    async fn empty(&self) -> PlainText<&'static str> {
        PlainText("")
    }
}

pub async fn serve() -> anyhow::Result<()> {
    let acceptor = TcpListener::bind("127.0.0.1:0").into_acceptor().await?;
    for address in acceptor.local_addr() {
        println!("{address}");
    }
    let api = OpenApiService::new(Empty, "empty", "1");
    Ok(Server::new_with_acceptor(acceptor).run(Route::new().nest("/", api)).await?)
}
