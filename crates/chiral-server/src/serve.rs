//! Serving by itself: over WebSocket, on a Zenoh network, or both, as the server was built.

use crate::{
    error::Error,
    server::{PolicyServer, STOP_LIMIT},
};
#[cfg(feature = "websocket")]
use std::net::SocketAddr;
#[cfg(feature = "websocket")]
use tokio::net::TcpListener;

impl PolicyServer {
    /// Serves until it is shut down, on a runtime of its own; blocks. Not to be called within a tokio
    /// runtime: there, use [`PolicyServer::serve`].
    ///
    /// # Errors
    /// As [`PolicyServer::serve`]; also [`Error::Start`] if there can be no runtime.
    pub fn run(self) -> Result<(), Error> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("chiral-server").build();
        let runtime = runtime.map_err(|source| Error::Start { what: "a tokio runtime", source })?;
        let served = runtime.block_on(self.serve());
        runtime.shutdown_timeout(STOP_LIMIT);
        served
    }

    /// Serves until it is shut down, on the caller's runtime: over WebSocket at the address that the server
    /// was built with, on a Zenoh network if it was built to, or both.
    ///
    /// # Errors
    /// [`Error::Bind`] if the address cannot be listened on; on a Zenoh network `Error::NameTaken` and
    /// `Error::Zenoh`.
    pub async fn serve(self) -> Result<(), Error> {
        #[cfg(feature = "websocket")]
        {
            let default =
                (!self.inner.options.is_on_zenoh()).then(|| SocketAddr::from(([127, 0, 0, 1], 8765)));
            if let Some(address) = self.inner.options.bind.or(default) {
                let listener =
                    TcpListener::bind(address).await.map_err(|source| Error::Bind { address, source })?;
                return self.serve_on(listener).await;
            }
        }
        #[cfg(feature = "zenoh")]
        self.serve_zenoh().await?;
        Ok(())
    }

    /// The same, with a listener of the host's for WebSocket: at `/`, and `/healthz`.
    ///
    /// # Errors
    /// [`Error::Listener`] if the listener fails; on a Zenoh network `Error::NameTaken` and `Error::Zenoh`.
    #[cfg(feature = "websocket")]
    pub async fn serve_on(self, listener: TcpListener) -> Result<(), Error> {
        #[cfg(feature = "zenoh")]
        if self.inner.options.is_on_zenoh() {
            // Nobody is let in by WebSocket before the robot's name is its own on the network.
            let on_zenoh = self.enter_zenoh().await?;
            let zenoh = async {
                on_zenoh.serve().await;
                Ok(())
            };
            return tokio::try_join!(zenoh, self.serve_websocket(listener)).map(drop);
        }
        self.serve_websocket(listener).await
    }
}
