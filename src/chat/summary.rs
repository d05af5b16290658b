//! A rolling summary of what no longer fits into the context: made in the background, a few turns at a time, by the
//! model where it can, else of the sentences that say most. Turns are never removed.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    domain::{
        caller::TenantId,
        ids::SessionId,
        prompt::{Message, Role},
        search, tokens,
    },
    model::{Ask, Model, Options, Silence},
    store::{self, Material, PastTurn, Store, Summary},
};

/// How many turns must have fallen out of the window for another summary to be worth making.
pub const STEP: i64 = 8;
/// The most turns that are summarised at once.
const TURNS: i64 = 64;
/// The most steps that are made after one turn.
const STEPS: usize = 8;
/// Of a session that was filled from elsewhere, the turns before the window that are summarised; older ones are found
/// by recall.
const REACH: i64 = 512;
/// The longest sentence that an extract holds, in characters.
const SENTENCE: usize = 200;

/// What is to be summarised: everything up to a turn.
#[derive(Clone, Debug)]
pub struct Due {
    pub tenant: TenantId,
    pub session: SessionId,
    /// The summary so far, and the last turn that it covers.
    pub summary: Option<String>,
    pub was_through: Option<i64>,
    pub takings: i64,
    /// The last turn that is to be covered.
    pub through: i64,
}

impl Due {
    /// What is to be done once a context has been assembled that begins at `first_turn`.
    pub fn after(
        (tenant, session): (TenantId, SessionId),
        material: &Material,
        first_turn: Option<i64>,
    ) -> Option<Self> {
        let through = first_turn? - 1;
        let covered = material.summary_through.unwrap_or(0);
        (through - covered >= STEP).then(|| Self {
            tenant,
            session,
            summary: material.summary.clone(),
            was_through: material.summary_through,
            takings: material.takings,
            through,
        })
    }

    /// Summarises step by step, within `budget` tokens, until everything due is covered or there were many steps: the rest
    /// is due again after the next turn.
    pub async fn work(
        mut self,
        store: &Store,
        model: Option<&dyn Model>,
        budget: i64,
        time: Duration,
    ) -> store::Result<()> {
        for _ in 0..STEPS {
            let summary = self.step(store, model, budget, time).await?;
            let (text, through) = (summary.text.clone(), summary.through);
            let kept = store.keep_summary(self.tenant, self.session, summary).await?;
            if !kept || through >= self.through {
                break;
            }
            (self.summary, self.was_through) = (Some(text), Some(through));
        }
        Ok(())
    }

    /// The summary with some turns more.
    async fn step(
        &self,
        store: &Store,
        model: Option<&dyn Model>,
        budget: i64,
        time: Duration,
    ) -> store::Result<Summary> {
        let first = (self.was_through.unwrap_or(0) + 1).max(self.through - REACH + 1);
        let mut turns = store.past_turns(self.tenant, self.session, (first, self.through), TURNS).await?;
        let all = turns.len();
        let mut left = 4 * budget;
        let fits = |turn: &PastTurn| {
            left -= turn.tokens;
            left >= 0
        };
        // One turn at least, so that it goes on.
        let fitting = turns.iter().map(fits).take_while(|fits| *fits).count().max(1);
        turns.truncate(fitting);
        let through = match turns.last() {
            Some(last) if turns.len() < all || i64::try_from(all).is_ok_and(|all| all == TURNS) => last.turn,
            // What is left out was not completed.
            _ => self.through,
        };
        let before = self.summary.as_deref().unwrap_or_default();
        let by_model = match model {
            Some(model) => by_model(model, before, &turns, budget, time).await,
            None => None,
        };
        // Also where the model refuses: what it refuses once, it would refuse for ever.
        let text = by_model.unwrap_or_else(|| extract(before, &turns, budget));
        let (tokens, takings, was_through) = (tokens::count(&text), self.takings, self.was_through);
        Ok(Summary { text, tokens, through, takings, was_through })
    }
}

/// What a model makes of the summary so far and further turns; nothing if it fails.
async fn by_model(
    model: &dyn Model,
    before: &str,
    turns: &[PastTurn],
    budget: i64,
    time: Duration,
) -> Option<String> {
    let wish = format!(
        "You keep the summary of a conversation between a user and an assistant. Rewrite the summary so that it also \
         covers the further turns: who the user is, what they want, what was decided, what is open. Leave out \
         pleasantries. Answer with the summary only, in the language of the conversation, in at most {} words.",
        budget / 2
    );
    let mut text =
        format!("Summary so far:\n{}\n\nFurther turns:", if before.is_empty() { "(none)" } else { before });
    let longest = usize::try_from(4 * budget).unwrap_or(usize::MAX);
    for turn in turns {
        for (speaker, said) in [("User", &turn.message), ("Assistant", &turn.response)] {
            text.extend(["\n", speaker, ": ", cut(said, longest)]);
        }
    }
    let ask = Ask {
        messages: vec![Message::new(Role::System, wish), Message::new(Role::User, text)],
        options: Options::default(),
        stream: false,
        deadline: Instant::now() + time,
    };
    match model.reply(&ask, &Silence).await {
        // Whatever its length, it has to fit.
        Ok(reply) => Some(within(reply.text.trim(), budget)).filter(|text| !text.is_empty()),
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "summary not made");
            None
        }
    }
}

/// The beginning of a text, of at most `chars` characters.
fn cut(text: &str, chars: usize) -> &str {
    text.char_indices().nth(chars).map_or(text, |(end, _)| &text[..end])
}

/// As much of the beginning of a text as is at most `budget` tokens.
fn within(text: &str, budget: i64) -> String {
    let mut text = text.to_owned();
    while tokens::count(&text) > budget {
        let shorter = text.chars().count() * 9 / 10;
        text.truncate(cut(&text, shorter).len());
    }
    text
}

/// The sentences of the users' messages that say most, a line each, in their order; those kept before compete with
/// the new ones.
fn extract(before: &str, turns: &[PastTurn], budget: i64) -> String {
    let new = turns.iter().filter_map(|turn| telling_sentence(&turn.message)).map(|line| format!("- {line}"));
    let lines: Vec<String> = before.lines().map(str::to_owned).chain(new).collect();
    // Different words tell more than many; of lines that tell as much, the later ones stay.
    let mut best: Vec<usize> = (0..lines.len()).collect();
    best.sort_by_cached_key(|i| std::cmp::Reverse((search::terms([&lines[*i], ""]).len().min(12), *i)));
    let mut left = budget;
    best.retain(|i| {
        let cost = tokens::count(&lines[*i]) + 1;
        let fits = cost <= left;
        left -= if fits { cost } else { 0 };
        fits
    });
    best.sort_unstable();
    best.into_iter().map(|i| lines[i].as_str()).collect::<Vec<_>>().join("\n")
}

/// The sentence of a message with the most different words that say something; none if none has two.
fn telling_sentence(message: &str) -> Option<String> {
    let sentences = message.split_inclusive(['.', '!', '?', '\n', '。']).map(str::trim);
    let told = |sentence: &&str| search::terms([cut(sentence, SENTENCE), ""]).len();
    let best = sentences.rev().max_by_key(told).filter(|sentence| told(sentence) > 1)?;
    let line = best.split_whitespace().collect::<Vec<_>>().join(" ");
    Some(match cut(&line, SENTENCE) {
        whole if whole.len() == line.len() => line,
        part => format!("{part}…"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(turn: i64, message: &str) -> PastTurn {
        PastTurn { turn, message: message.to_owned(), response: "Noted.".to_owned(), tokens: 10 }
    }

    #[test]
    fn an_extract_keeps_the_sentences_that_say_most_in_their_order() {
        let turns = [
            turn(1, "Hi! How are you?"),
            turn(2, "We fly to Lisbon on the third of May. Ok?"),
            turn(3, "And what of it?"),
            turn(4, "The hotel must take our dog Rex"),
        ];
        let text = extract("- They plan a trip.", &turns, 100);
        assert_eq!(
            text,
            "- They plan a trip.\n- We fly to Lisbon on the third of May.\n- The hotel must take our dog Rex"
        );
        let short = extract("- They plan a trip.", &turns, 21);
        assert_eq!(short, "- We fly to Lisbon on the third of May.\n- The hotel must take our dog Rex");
    }

    #[test]
    fn an_extract_never_grows_past_its_budget() {
        let mut text = String::new();
        for i in 0..200 {
            let turns: Vec<_> =
                (0..8).map(|j| turn(i * 8 + j, &format!("Topic {i} {j} {}", "word ".repeat(50)))).collect();
            text = extract(&text, &turns, 300);
            assert!(tokens::count(&text) <= 300);
        }
        assert!(text.contains("Topic 199"));
    }
}
