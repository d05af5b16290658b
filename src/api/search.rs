//! `/search`: the turns that answer a question.

use std::sync::Arc;

use poem::Result;
use poem_openapi::{Enum, Object, OpenApi, param::Query};

use super::{
    Tag,
    envelope::{Found, PageView, found},
    error::ApiError,
    wire::{Cursor, Limit, SearchText},
};
use crate::{
    app::App,
    domain::{
        caller::Caller,
        clock::Timestamp,
        ids::SessionId,
        page::{Listing, Page, Position},
        search::{Question, Scope},
        session::UserId,
    },
    store::{Excerpt, Hit, Search},
};

/// The length of a snippet, in characters.
const SNIPPET: usize = 200;

/// Which part of a turn was found.
#[derive(Clone, Copy, Debug, Enum)]
#[oai(rename_all = "lowercase")]
enum Field {
    Message,
    Response,
}

/// A turn that was found.
#[derive(Object)]
struct SearchHit {
    /// The session of the turn.
    session_id: SessionId,
    /// The turn's number.
    #[oai(validator(minimum(value = "1")))]
    turn: i64,
    /// Whose session it is.
    user_id: UserId,
    /// The part that answers best.
    field: Field,
    /// A piece of it, around the words that were found: about 200 characters at most.
    snippet: String,
    /// The higher, the better; comparable within one search.
    score: f64,
    /// When the turn was made.
    created_at: Timestamp,
}

pub struct SearchApi(pub Arc<App>);

#[OpenApi(prefix_path = "/api/v1", tag = "Tag::Search")]
impl SearchApi {
    /// Search turns
    ///
    /// Completed turns with any of the words, in any order and in any of their English forms; those with more of them,
    /// and with rarer ones, first. `"Quoted words"` must stand as they are. Words such as "the" and "what" are not
    /// looked for. At most the 1,000 newest turns with the rarest of the words are ranked, and as many with all of
    /// them; of a message or response the first 20,000 characters count. Pages may shift while turns are added.
    #[expect(clippy::too_many_arguments, reason = "each is a parameter of the operation")]
    #[oai(path = "/search", method = "get", operation_id = "search")]
    async fn search(
        &self,
        caller: Caller,
        /// What to look for: any text of 1 to 1,000 characters.
        q: Query<SearchText>,
        /// Only this user's turns.
        user_id: Query<Option<UserId>>,
        /// Only turns of this session.
        session_id: Query<Option<SessionId>>,
        /// Only turns made at this time or later.
        from: Query<Option<Timestamp>>,
        /// Only turns made before this time.
        to: Query<Option<Timestamp>>,
        /// Turns on a page at most: 1 to 100.
        #[oai(default)]
        limit: Query<Limit>,
        /// `next_cursor` of the page before.
        cursor: Query<Option<Cursor>>,
    ) -> Result<Found<PageView<SearchHit>>, ApiError> {
        let filters = format!("{:?}", (&user_id.0, &session_id.0, &from.0, &to.0));
        let listing = Listing::of(&["search", &q.0.0, &filters]);
        let after = Cursor::read(cursor.0.as_ref(), listing)?;
        let skipped = after.and_then(|position| usize::try_from(position.key).ok()).unwrap_or(0);
        let user = user_id.0.or_else(|| caller.user.clone());
        let scope = match (session_id.0, &user) {
            (_, Some(user)) if !caller.may_see(user) => None,
            (Some(id), _) if caller.user.is_some() => {
                self.0.store.session(&caller, id).await?.map(|session| Scope::Session(session.id))
            }
            (Some(id), _) => Some(Scope::Session(id)),
            (None, Some(user)) => Some(Scope::User(user.clone())),
            (None, None) => Some(Scope::Tenant),
        };
        let question = Question::parse(&q.0.0);
        let hits = match scope {
            Some(scope) => {
                let search = Search::new(question.clone(), scope);
                let search = Search { user, from: from.0, to: to.0, ..search };
                self.0.store.search(caller.tenant, &search).await?
            }
            None => Vec::new(),
        };
        let end = hits.len().min(skipped + limit.0.0);
        let next = (end < hits.len()).then(|| Position { key: i64::try_from(end).unwrap_or(0), id: 0 });
        let page = hits.get(skipped..end).unwrap_or_default();
        let items = self.show(&caller, &question, page).await?;
        Ok(found(PageView::of(Page { items, next }, listing), self.0.clock.now()))
    }
}

impl SearchApi {
    /// Hits with what they say; those that were erased meanwhile are left out.
    async fn show(
        &self,
        caller: &Caller,
        question: &Question,
        hits: &[Hit],
    ) -> Result<Vec<SearchHit>, ApiError> {
        let places: Vec<_> = hits.iter().map(|hit| (hit.session, hit.turn)).collect();
        let excerpts = self.0.store.excerpts(caller.tenant, &places).await?;
        let show = |hit: &Hit| {
            let is_it = |excerpt: &&Excerpt| (excerpt.session_id, excerpt.turn) == (hit.session, hit.turn);
            let excerpt = excerpts.iter().find(is_it)?;
            let (field, text) = match hit.in_response {
                true => (Field::Response, &excerpt.response),
                false => (Field::Message, &excerpt.message),
            };
            Some(SearchHit {
                session_id: hit.session,
                turn: hit.turn,
                user_id: excerpt.user_id.clone(),
                field,
                snippet: question.snippet(text, SNIPPET),
                score: (hit.score * 10_000.0).round() / 10_000.0,
                created_at: excerpt.created_at,
            })
        };
        Ok(hits.iter().filter_map(show).collect())
    }
}
