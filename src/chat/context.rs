//! What the model is shown: assembled from what is known, within a budget of tokens.
//!
//! The message always goes. Then, as far as the budget reaches: the system prompt with the style, the last
//! turns, what is known about the user, the task's state, the summary, and older turns, newest first.

use crate::{
    domain::{
        memory::BehaviorProfile,
        prompt::{Message, Role},
        tokens::{self, MESSAGE_OVERHEAD},
    },
    store::{Material, PastTurn},
};

/// What a pair of messages costs beside its text.
const TURN_OVERHEAD: i64 = 2 * MESSAGE_OVERHEAD;

/// How much may be shown.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// The most tokens of all messages together, as [`tokens::count`] counts.
    pub tokens: i64,
    /// The newest turns that come before anything but the system prompt.
    pub last_turns: usize,
}

/// Puts together what the model is shown for `message`.
pub fn assemble(material: &Material, default_prompt: &str, message: &str, budget: Budget) -> Vec<Message> {
    let mut left = budget.tokens - tokens::count(message) - MESSAGE_OVERHEAD;

    let mut system = Sections { texts: Vec::new() };
    let prompt = material.system_prompt.as_deref().unwrap_or(default_prompt);
    system.add(prompt.to_owned(), &mut left);
    system.add(style(&material.profile), &mut left);

    let newest_first = || material.turns.iter().rev();
    let mut shown = fitting(newest_first().take(budget.last_turns), &mut left);
    system.add(facts(material), &mut left);
    system.add(working_memory(material), &mut left);
    system.add(summary(material), &mut left);
    // Turns are shown without gaps: if the last ones did not all fit, older ones do not follow.
    if shown == budget.last_turns.min(material.turns.len()) {
        shown += fitting(newest_first().skip(shown), &mut left);
    }

    let older = material.turns.len() - shown;
    let mut messages = Vec::with_capacity(2 + 2 * shown);
    messages.extend(system.into_message());
    for turn in &material.turns[older..] {
        messages.push(Message::new(Role::User, turn.message.as_str()));
        messages.push(Message::new(Role::Assistant, turn.response.as_str()));
    }
    messages.push(Message::new(Role::User, message));
    messages
}

/// How many of these turns fit into what is left, up to the first that does not.
fn fitting<'a>(turns: impl Iterator<Item = &'a PastTurn>, left: &mut i64) -> usize {
    let fits = |turn: &&PastTurn| {
        let cost = turn.tokens + TURN_OVERHEAD;
        let fits = cost <= *left;
        *left -= if fits { cost } else { 0 };
        fits
    };
    turns.take_while(fits).count()
}

/// The parts of the one system message.
struct Sections {
    texts: Vec<String>,
}

impl Sections {
    /// Adds a part if it says anything and fits.
    fn add(&mut self, text: String, left: &mut i64) {
        // Separated by an empty line; the first part pays for the message.
        let cost = tokens::count(&text) + if self.texts.is_empty() { MESSAGE_OVERHEAD } else { 1 };
        if !text.is_empty() && cost <= *left {
            *left -= cost;
            self.texts.push(text);
        }
    }

    fn into_message(self) -> Option<Message> {
        (!self.texts.is_empty()).then(|| Message::new(Role::System, self.texts.join("\n\n")))
    }
}

/// How to answer, where it is not the usual way.
fn style(profile: &BehaviorProfile) -> String {
    let wishes = [
        (profile.verbosity.as_str(), "low", "Answer briefly."),
        (profile.verbosity.as_str(), "high", "Answer at length."),
        (profile.tone.as_str(), "casual", "Keep a casual tone."),
        (profile.tone.as_str(), "technical", "Keep a technical tone."),
        (profile.depth.as_str(), "shallow", "Stay on the surface."),
        (profile.depth.as_str(), "advanced", "Go into depth, as for an expert."),
    ];
    let said = wishes.into_iter().filter(|(is, wanted, _)| is == wanted).map(|(.., wish)| wish);
    said.collect::<Vec<_>>().join(" ")
}

fn facts(material: &Material) -> String {
    let lines: Vec<_> = material.facts.iter().map(|fact| format!("\n- {}", fact.line())).collect();
    if lines.is_empty() { String::new() } else { format!("What is known about the user:{}", lines.concat()) }
}

fn working_memory(material: &Material) -> String {
    match material.working_memory.as_str() {
        "{}" => String::new(),
        state => format!("State of the present task:\n{state}"),
    }
}

fn summary(material: &Material) -> String {
    material.summary.as_ref().map(|text| format!("Earlier in this conversation:\n{text}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::memory::Fact;

    fn material(turns: usize) -> Material {
        let turn = |i| {
            let (message, response) = (format!("message {i}"), format!("response {i}"));
            let tokens = tokens::count(&message) + tokens::count(&response);
            PastTurn { message, response, tokens }
        };
        Material {
            system_prompt: None,
            profile: BehaviorProfile {
                verbosity: "low".into(),
                tone: "neutral".into(),
                depth: "advanced".into(),
            },
            working_memory: json!({"task": "tax return"}).to_string(),
            summary: Some("They greeted each other.".into()),
            facts: vec![Fact { key: "name".into(), value: json!("John") }],
            turns: (1..=turns).map(turn).collect(),
        }
    }

    fn cost(messages: &[Message]) -> i64 {
        messages.iter().map(|message| tokens::count(&message.content) + MESSAGE_OVERHEAD).sum()
    }

    fn assembled(turns: usize, tokens: i64) -> Vec<Message> {
        assemble(&material(turns), "Be helpful.", "Now?", Budget { tokens, last_turns: 2 })
    }

    #[test]
    fn everything_known_stands_before_the_message_in_order() {
        let messages = assembled(2, 8000);
        let system = "Be helpful.\n\nAnswer briefly. Go into depth, as for an expert.\n\n\
             What is known about the user:\n- name: John\n\n\
             State of the present task:\n{\"task\":\"tax return\"}\n\n\
             Earlier in this conversation:\nThey greeted each other.";
        let expected = [
            (Role::System, system),
            (Role::User, "message 1"),
            (Role::Assistant, "response 1"),
            (Role::User, "message 2"),
            (Role::Assistant, "response 2"),
            (Role::User, "Now?"),
        ];
        assert_eq!(messages, expected.map(|(role, content)| Message::new(role, content)));
    }

    #[test]
    fn no_budget_is_exceeded_and_roles_alternate() {
        let least = tokens::count("Now?") + MESSAGE_OVERHEAD;
        for budget in least..400 {
            let messages = assembled(20, budget);
            assert!(cost(&messages) <= budget, "{budget}");
            let talk: Vec<_> = messages.iter().map(|m| m.role).skip_while(|r| *r == Role::System).collect();
            assert!(talk.chunks(2).all(|pair| pair[0] == Role::User), "{budget}");
            assert!(talk.windows(2).all(|pair| pair[0] != pair[1]), "{budget}");
        }
    }

    #[test]
    fn the_newest_turns_are_kept_and_none_is_skipped() {
        for budget in 8..400 {
            let texts: Vec<_> = assembled(20, budget).into_iter().map(|m| m.content).collect();
            let shown: Vec<_> = texts.iter().filter_map(|text| text.strip_prefix("message ")).collect();
            let newest: Vec<_> = (21 - shown.len()..=20).map(|i| i.to_string()).collect();
            assert_eq!(shown, newest, "{budget}");
        }
    }

    #[test]
    fn a_message_over_the_budget_goes_alone() {
        let budget = Budget { tokens: 1, last_turns: 2 };
        let messages = assemble(&material(3), "Be helpful.", "A long message indeed", budget);
        assert_eq!(messages, [Message::new(Role::User, "A long message indeed")]);
    }
}
