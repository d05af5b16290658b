//! Taking sessions out as an archive, and an archive in; see [`crate::domain::archive`].

use std::{io, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use poem::{Body, IntoResponse, Request, RequestBody, Response, Result, http::header};
use poem_openapi::{
    ApiExtractor, ApiExtractorType, ApiResponse, ExtractParamOptions, Object, OpenApi,
    param::Path,
    registry::{
        MetaHeader, MetaMediaType, MetaRequest, MetaResponse, MetaResponses, MetaSchema, MetaSchemaRef,
        Registry,
    },
};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout, timeout_at},
};

use super::{
    Tag,
    envelope::{Found, found},
    error::{ApiError, Code, Detail},
    json::{BODY_TIMEOUT, check_content_type},
    wire::SessionRef,
};
use crate::{
    app::App,
    domain::{
        archive::{Bad, BadKind},
        caller::Caller,
        session::UserId,
    },
    store::{self, Export, Import, NotImported, Store, What},
    telemetry::carried,
};

const MEDIA_TYPE: &str = "application/x-ndjson";
/// Imports at once; more are refused. Each may hold two long texts and what it has not written yet, some 70 MiB.
const MAX_IMPORTS: usize = 8;
/// How much of an archive that was refused is read and thrown away, so that the client, still sending, gets to read
/// the answer.
const DRAIN: usize = 16 << 20;
/// How long it may be until more of it comes.
const PAUSE: Duration = Duration::from_secs(1);

/// What was taken in.
#[derive(Object)]
struct Imported {
    /// Sessions that were made.
    #[oai(validator(minimum(value = "0")))]
    sessions: i64,
    /// Their turns.
    #[oai(validator(minimum(value = "0")))]
    turns: i64,
    /// Facts that were not known yet.
    #[oai(validator(minimum(value = "0")))]
    facts: i64,
    /// Sessions that were there already. They stay as they are.
    #[oai(validator(minimum(value = "0")))]
    skipped_sessions: i64,
}

pub struct ArchiveApi {
    app: Arc<App>,
    imports: Arc<Semaphore>,
}

#[OpenApi(prefix_path = "/api/v1", tag = "Tag::Archive")]
impl ArchiveApi {
    /// Export a session
    ///
    /// The session with its turns, its memory and what was learnt from it. A turn that is running is left out.
    #[oai(path = "/sessions/:session_id/export", method = "get", operation_id = "exportSession")]
    async fn export_session(
        &self,
        caller: Caller,
        /// The session's id.
        session_id: Path<SessionRef>,
    ) -> Result<Archive, ApiError> {
        let not_found = || ApiError::session_not_found(&session_id.text);
        let id = session_id.id.ok_or_else(not_found)?;
        let export = self.export(&caller, What::Session(id)).await?.ok_or_else(not_found)?;
        Ok(Archive { export, name: format!("{id}.ndjson") })
    }

    /// Export a user
    ///
    /// Every session of the user, temporary ones last, and what is known about them.
    #[oai(path = "/users/:user_id/export", method = "get", operation_id = "exportUser")]
    async fn export_user(
        &self,
        caller: Caller,
        /// The user's id.
        user_id: Path<UserId>,
    ) -> Result<Archive, ApiError> {
        let not_found = || ApiError::user_not_found(&user_id);
        let export = self.export(&caller, What::User(user_id.0.clone())).await?.ok_or_else(not_found)?;
        Ok(Archive { export, name: "user.ndjson".to_owned() })
    }

    /// Import an archive
    ///
    /// Takes back what was exported, from here or elsewhere, of any size. Each session can be found once it is whole;
    /// one that is there already stays as it is, so importing twice changes nothing, and an import that broke off is
    /// simply run again. A refusal names the line.
    #[oai(path = "/import", method = "post", operation_id = "importArchive")]
    async fn import(&self, caller: Caller, archive: ArchiveBody) -> Result<Found<Imported>, ApiError> {
        // In a task of its own: what is half written is removed though the client leaves.
        let store = self.app.store.clone();
        let place = self.imports.clone().try_acquire_owned().map_err(|_| ApiError::overloaded())?;
        let imported = self.app.tasks.spawn(carried(async move {
            let imported = take_in(&store, caller, archive.0).await;
            drop(place);
            imported
        }));
        let imported = imported.await.map_err(|_| ApiError::internal())??;
        Ok(found(imported, self.app.clock.now()))
    }
}

impl ArchiveApi {
    pub fn new(app: Arc<App>) -> Self {
        Self { app, imports: Arc::new(Semaphore::new(MAX_IMPORTS)) }
    }

    async fn export(&self, caller: &Caller, what: What) -> Result<Option<Export>, ApiError> {
        Ok(self.app.store.export(caller, what, self.app.clock.now()).await?)
    }
}

async fn take_in(store: &Store, caller: Caller, body: Body) -> Result<Imported, ApiError> {
    let mut import = store.import(&caller).await?;
    let mut bytes = Box::pin(body.into_bytes_stream());
    let imported = match read(&mut import, &mut bytes).await {
        Ok(()) => import.finish().await.map_err(ApiError::from),
        Err(refusal) => Err(refusal),
    };
    match imported {
        Ok(store::Imported { sessions, turns, facts, skipped_sessions }) => {
            Ok(Imported { sessions, turns, facts, skipped_sessions })
        }
        Err(refusal) => {
            if let Err(error) = import.undo().await {
                tracing::warn!(error = &error as &dyn std::error::Error, "a broken import is removed later");
            }
            drain(bytes).await;
            Err(refusal)
        }
    }
}

async fn read<B: AsRef<[u8]>>(
    import: &mut Import,
    bytes: &mut (impl Stream<Item = io::Result<B>> + Unpin),
) -> Result<(), ApiError> {
    while let Some(portion) = timeout(BODY_TIMEOUT, bytes.next()).await.map_err(|_| too_slow())? {
        let portion = portion.map_err(|_| ApiError::new(Code::InvalidRequest, "The body broke off"))?;
        import.feed(portion.as_ref()).await?;
    }
    Ok(())
}

fn too_slow() -> ApiError {
    let message = format!("Nothing of the archive came for {} seconds", BODY_TIMEOUT.as_secs());
    ApiError::new(Code::RequestTimeout, message)
}

async fn drain<B: AsRef<[u8]>>(mut bytes: impl Stream<Item = io::Result<B>> + Unpin) {
    let (deadline, mut drained) = (Instant::now() + BODY_TIMEOUT, 0);
    let still_sending = || deadline.min(Instant::now() + PAUSE);
    while let Ok(Some(Ok(portion))) = timeout_at(still_sending(), bytes.next()).await {
        drained += portion.as_ref().len();
        if drained > DRAIN {
            return;
        }
    }
}

impl From<NotImported> for ApiError {
    fn from(refusal: NotImported) -> Self {
        let message = refusal.to_string();
        let wait = Duration::from_secs(1);
        match refusal {
            NotImported::Bad(bad) => bad.into(),
            NotImported::Busy { wait, .. } => Self::new(Code::SessionBusy, message).retry_after(wait),
            NotImported::Late(_) => Self::new(Code::Overloaded, message).retry_after(wait),
            NotImported::Foreign(_) => Self::new(Code::Forbidden, message),
            NotImported::Erased(_) => Self::new(Code::UserNotFound, message),
            NotImported::Store(error) => error.into(),
        }
    }
}

impl From<Bad> for ApiError {
    fn from(bad: Bad) -> Self {
        let code = match bad.kind {
            BadKind::TooLong => Code::PayloadTooLarge,
            BadKind::NotJson => Code::InvalidJson,
            BadKind::Invalid => Code::ValidationError,
        };
        let message = bad.to_string();
        let detail = |field| Detail { field, message: bad.problem };
        Self { details: bad.field.map(detail).into_iter().collect(), ..Self::new(code, message) }
    }
}

/// The archive of an answer.
struct Archive {
    export: Export,
    name: String,
}

/// The archive of a request.
struct ArchiveBody(Body);

impl IntoResponse for Archive {
    fn into_response(self) -> Response {
        let request = tracing::Span::current();
        let portions = stream::unfold((Some(self.export), request), async |(export, request)| {
            let mut export = export?;
            match export.next().await {
                Ok(portion) => portion.map(|portion| (Ok(portion), (Some(export), request))),
                // The connection breaks, so that what was sent does not look whole.
                Err(error) => {
                    let broken = &error as &dyn std::error::Error;
                    tracing::error!(parent: &request, error = broken, "an export broke off");
                    Some((Err(io::Error::other(error)), (None, request)))
                }
            }
        });
        Response::builder()
            .content_type(MEDIA_TYPE)
            .header(header::CONTENT_DISPOSITION, format!("attachment; filename=\"{}\"", self.name))
            .header(header::CACHE_CONTROL, "no-store")
            .body(Body::from_bytes_stream(Box::pin(portions)))
    }
}

impl ApiResponse for Archive {
    fn meta() -> MetaResponses {
        let disposition = MetaHeader {
            name: "Content-Disposition".to_owned(),
            description: Some("The name of a file for it.".to_owned()),
            required: true,
            deprecated: false,
            schema: MetaSchemaRef::Inline(Box::new(MetaSchema::new("string"))),
        };
        MetaResponses {
            responses: vec![MetaResponse {
                description: "Lines of JSON, of at most 1 MiB each: `archive`, which says what it is; for each session \
                     `session`, its `turn`s (a long text before its turn, in `piece`s) and `session_end` with a \
                     digest of these lines; then `fact`s; at last `end`, with a digest of everything between. If the \
                     connection breaks before `end`, it is not whole.",
                status: Some(200),
                status_range: None,
                content: vec![media_type()],
                headers: vec![disposition],
            }],
        }
    }

    fn register(_: &mut Registry) {}
}

impl<'a> ApiExtractor<'a> for ArchiveBody {
    const TYPES: &'static [ApiExtractorType] = &[ApiExtractorType::RequestObject];
    type ParamType = ();
    type ParamRawType = ();

    fn request_meta() -> Option<MetaRequest> {
        let description = "An archive as it was exported.";
        Some(MetaRequest { description: Some(description), content: vec![media_type()], required: true })
    }

    async fn from_request(
        request: &'a Request,
        body: &mut RequestBody,
        _: ExtractParamOptions<()>,
    ) -> Result<Self> {
        check_content_type(request, MEDIA_TYPE)?;
        Ok(Self(body.take()?))
    }
}

fn media_type() -> MetaMediaType {
    let example = concat!(
        r#"{"type":"archive","format":"atlus","version":1,"of":"session","#,
        r#""exported_at":"2024-01-01T12:00:00.000Z","atlus":"0.1.0"}"#,
        "\n",
        r#"{"type":"end","sessions":0,"turns":0,"facts":0,"#,
        r#""digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}"#,
        "\n",
    );
    let schema = MetaSchema { example: Some(example.into()), ..MetaSchema::new("string") };
    MetaMediaType { content_type: MEDIA_TYPE, schema: MetaSchemaRef::Inline(Box::new(schema)) }
}
