# The server in an image: the binary, the C library and the certificates of public authorities, and nothing else.
# docs/packages.md tells how it is run.

FROM rust:1.95-slim-bookworm AS build
WORKDIR /build
# The dependencies first, in a layer of their own: it lasts until the lock file changes.
COPY Cargo.toml Cargo.lock ./
COPY .cargo .cargo
RUN mkdir src \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs \
    && cargo build --locked --release
COPY migrations migrations
COPY src src
# Cargo goes by times, and the files may be older than what was built in their place.
RUN touch src/main.rs src/lib.rs \
    && cargo build --locked --release \
    && mkdir /data

# No shell and no package manager; it has libgcc, the certificates that a model server's are checked by, and the user
# `nonroot`, 65532.
FROM gcr.io/distroless/cc-debian12:nonroot
LABEL org.opencontainers.image.title="ATLUS" \
      org.opencontainers.image.description="Conversation-session server: sessions, turns and memory in SQL, in front of any OpenAI-compatible model" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build --chown=65532:65532 /data /data
COPY --from=build /build/target/release/atlus /usr/local/bin/
COPY LICENSE /usr/share/doc/atlus/
# Others reach a container, so callers show a key.
ENV ATLUS_LISTEN=0.0.0.0:5000 \
    ATLUS_AUTH=required \
    ATLUS_DATABASE_URL=sqlite:///data/atlus.db
# As a number, so that Kubernetes sees that it is not root.
USER 65532:65532
WORKDIR /data
VOLUME /data
EXPOSE 5000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["/usr/local/bin/atlus", "doctor", "--live"]
ENTRYPOINT ["/usr/local/bin/atlus"]
CMD ["serve"]
