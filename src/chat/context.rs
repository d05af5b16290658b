//! What the model is shown: assembled from what is known, within a budget of tokens.
//!
//! The message always goes. Then, as far as the budget reaches: the system prompt with the style, the last
//! turns, what is known about the user, the task's state, the summary, older turns that bear on the message, and
//! further turns, newest first.

use std::cmp::Reverse;

use crate::{
    domain::{
        memory::{BehaviorProfile, Fact},
        prompt::{Message, Role},
        search::Question,
        tokens::{self, MESSAGE_OVERHEAD},
    },
    store::{Material, PastTurn},
};

/// What a pair of messages costs beside its text.
const TURN_OVERHEAD: i64 = 2 * MESSAGE_OVERHEAD;

/// What stands for a response that was empty.
const NO_RESPONSE: &str = "…";

/// How much may be shown.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// The most tokens of all messages together, as [`tokens::count`] counts.
    pub tokens: i64,
    /// The newest turns that come before anything but the system prompt.
    pub last_turns: usize,
}

impl Budget {
    /// The most tokens of older turns that are brought back: they must not crowd out what was said last.
    fn recalled(self) -> i64 {
        self.tokens / 4
    }
}

/// What the model is shown, and what it is not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Context {
    /// The message is the last, if there is one.
    pub messages: Vec<Message>,
    /// Tokens of all messages together.
    pub tokens: i64,
    /// Tokens that there might have been.
    pub budget: i64,
    pub included: Parts,
    pub dropped: Parts,
    /// The oldest of the last turns that are shown without a gap; none if no turn is.
    pub first_turn: Option<i64>,
}

/// How many items of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    pub system_prompt: i64,
    pub style: i64,
    pub facts: i64,
    pub working_memory: i64,
    pub summary: i64,
    /// Older turns that bear on the message.
    pub recalled_turns: i64,
    /// The last turns.
    pub recent_turns: i64,
    pub message: i64,
}

/// Puts together what the model is shown for `message`; `recalled` are older turns that bear on it, best first.
pub fn assemble(
    material: &Material,
    default_prompt: &str,
    message: Option<&str>,
    recalled: &[PastTurn],
    budget: Budget,
) -> Context {
    let mut left = budget.tokens - message.map_or(0, cost_of_message);
    let (mut included, mut dropped) = (Parts::default(), Parts::default());
    let mut system = Sections { texts: Vec::new() };

    let prompt = material.system_prompt.as_deref().unwrap_or(default_prompt);
    system.add(prompt.to_owned(), &mut left, (&mut included.system_prompt, &mut dropped.system_prompt));
    system.add(style(&material.profile), &mut left, (&mut included.style, &mut dropped.style));

    let newest_first = || material.turns.iter().rev();
    let mut shown = fitting(newest_first().take(budget.last_turns), &mut left);
    let (facts, known) = facts(&material.facts, message, left - system.cost_of_next());
    (included.facts, dropped.facts) = (count(known), count(material.facts.len() - known));
    system.add(facts, &mut left, (&mut 0, &mut 0));
    let state = working_memory(material);
    system.add(state, &mut left, (&mut included.working_memory, &mut dropped.working_memory));
    system.add(summary(material), &mut left, (&mut included.summary, &mut dropped.summary));

    let mut back = Vec::new();
    let before = newest_first().take(shown).next_back().map_or(i64::MAX, |turn| turn.turn);
    let mut left_for_recalled = budget.recalled().min(left);
    for turn in recalled.iter().filter(|turn| turn.turn < before) {
        match fitting([turn].into_iter(), &mut left_for_recalled) {
            0 => dropped.recalled_turns += 1,
            _ => back.push(turn),
        }
    }
    left -= back.iter().map(|turn| cost(turn)).sum::<i64>();
    // The last turns are shown without gaps: if some did not fit, older ones do not follow.
    if shown == budget.last_turns.min(material.turns.len()) {
        let mut further = newest_first().skip(shown).peekable();
        while let Some(turn) = further.next_if(|turn| back.contains(turn) || cost(turn) <= left) {
            shown += 1;
            // One that was brought back stands in its place, and is paid for.
            let known = back.len();
            back.retain(|other| other.turn != turn.turn);
            left -= if back.len() == known { cost(turn) } else { 0 };
        }
    }
    included.recalled_turns = count(back.len());
    included.recent_turns = count(shown);
    dropped.recent_turns = (material.all_turns - included.recalled_turns - included.recent_turns).max(0);
    included.message = i64::from(message.is_some());

    let last = &material.turns[material.turns.len() - shown..];
    back.sort_by_key(|turn| turn.turn);
    let mut messages = Vec::with_capacity(2 + 2 * (back.len() + last.len()));
    messages.extend(system.into_message());
    for turn in back.into_iter().chain(last) {
        messages.push(Message::new(Role::User, turn.message.as_str()));
        // Some models refuse an empty message, and roles have to alternate.
        let response = if turn.response.is_empty() { NO_RESPONSE } else { turn.response.as_str() };
        messages.push(Message::new(Role::Assistant, response));
    }
    messages.extend(message.map(|message| Message::new(Role::User, message)));
    let tokens = messages.iter().map(|message| cost_of_message(&message.content)).sum();
    let budget = budget.tokens;
    Context { messages, tokens, budget, included, dropped, first_turn: last.first().map(|turn| turn.turn) }
}

fn count(items: usize) -> i64 {
    i64::try_from(items).unwrap_or(i64::MAX)
}

/// Tokens of a message by itself.
pub fn cost_of_message(text: &str) -> i64 {
    tokens::count(text) + MESSAGE_OVERHEAD
}

fn cost(turn: &PastTurn) -> i64 {
    let stand_in = if turn.response.is_empty() { tokens::count(NO_RESPONSE) } else { 0 };
    turn.tokens + stand_in + TURN_OVERHEAD
}

/// How many of these turns fit into what is left, up to the first that does not.
fn fitting<'a>(turns: impl Iterator<Item = &'a PastTurn>, left: &mut i64) -> usize {
    let fits = |turn: &&PastTurn| {
        let fits = cost(turn) <= *left;
        *left -= if fits { cost(turn) } else { 0 };
        fits
    };
    turns.take_while(fits).count()
}

/// The parts of the one system message.
struct Sections {
    texts: Vec<String>,
}

impl Sections {
    /// What the next part costs beside its text: it stands after an empty line; the first pays for the message.
    fn cost_of_next(&self) -> i64 {
        if self.texts.is_empty() { MESSAGE_OVERHEAD } else { 1 }
    }

    /// Adds a part if it says anything and fits; counts it as included or dropped.
    fn add(&mut self, text: String, left: &mut i64, (included, dropped): (&mut i64, &mut i64)) {
        let cost = tokens::count(&text) + self.cost_of_next();
        match (text.is_empty(), cost <= *left) {
            (true, _) => {}
            (false, false) => *dropped += 1,
            (false, true) => {
                *left -= cost;
                *included += 1;
                self.texts.push(text);
            }
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

/// The facts that fit into `left` tokens, in order of time: if not all do, those that bear on the message first, then
/// the newest; and how many they are.
fn facts(facts: &[Fact], message: Option<&str>, mut left: i64) -> (String, usize) {
    const HEADING: &str = "What is known about the user:";
    // Each in one line, so that no value can pass for another section.
    let line = |fact: &Fact| format!("\n- {}", fact.line().replace(['\n', '\r'], " "));
    let lines: Vec<String> = facts.iter().map(line).collect();
    left -= tokens::count(HEADING);
    let mut chosen: Vec<usize> = (0..lines.len()).collect();
    if lines.iter().map(|line| tokens::count(line)).sum::<i64>() > left {
        let question = Question::parse(message.unwrap_or_default());
        let bears = |i: &usize| question.count(&lines[*i]).terms.iter().filter(|count| **count > 0).count();
        chosen.sort_by_cached_key(|i| Reverse((bears(i), *i)));
        chosen.retain(|i| {
            let cost = tokens::count(&lines[*i]);
            let fits = cost <= left;
            left -= if fits { cost } else { 0 };
            fits
        });
        chosen.sort_unstable();
    }
    let text: String = chosen.iter().map(|i| lines[*i].as_str()).collect();
    (if text.is_empty() { text } else { format!("{HEADING}{text}") }, chosen.len())
}

fn working_memory(material: &Material) -> String {
    match material.working_memory.as_str() {
        "{}" => String::new(),
        state => format!("State of the present task:\n{state}"),
    }
}

fn summary(material: &Material) -> String {
    let summary = material.summary.as_ref().filter(|text| !text.is_empty());
    summary.map(|text| format!("Earlier in this conversation:\n{text}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn past(turn: i64, message: String, response: String) -> PastTurn {
        let tokens = tokens::count(&message) + tokens::count(&response);
        PastTurn { turn, message, response, tokens }
    }

    fn material(turns: i64) -> Material {
        Material {
            system_prompt: None,
            profile: BehaviorProfile {
                verbosity: "low".into(),
                tone: "neutral".into(),
                depth: "advanced".into(),
            },
            working_memory: json!({"task": "tax return"}).to_string(),
            summary: Some("They greeted each other.".into()),
            summary_through: Some(0),
            takings: 0,
            facts: vec![Fact { key: "name".into(), value: json!("John") }],
            turns: (1..=turns).map(|i| past(i, format!("message {i}"), format!("response {i}"))).collect(),
            all_turns: turns,
            next_turn: None,
        }
    }

    fn assembled(turns: i64, tokens: i64) -> Context {
        assemble(&material(turns), "Be helpful.", Some("Now?"), &[], Budget { tokens, last_turns: 2 })
    }

    fn texts(context: &Context) -> Vec<&str> {
        context.messages.iter().map(|message| message.content.as_str()).collect()
    }

    #[test]
    fn everything_known_stands_before_the_message_in_order() {
        let context = assembled(2, 8000);
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
        assert_eq!(context.messages, expected.map(|(role, content)| Message::new(role, content)));
        let included = Parts {
            system_prompt: 1,
            style: 1,
            facts: 1,
            working_memory: 1,
            summary: 1,
            recalled_turns: 0,
            recent_turns: 2,
            message: 1,
        };
        assert_eq!((context.included, context.dropped), (included, Parts::default()));
    }

    #[test]
    fn the_newest_turns_are_kept_and_none_is_skipped() {
        for budget in 8..400 {
            let context = assembled(20, budget);
            let shown: Vec<_> =
                texts(&context).into_iter().filter_map(|text| text.strip_prefix("message ")).collect();
            let newest: Vec<_> = (21 - shown.len()..=20).map(|i| i.to_string()).collect();
            assert_eq!(shown, newest, "{budget}");
            assert_eq!(context.included.recent_turns + context.dropped.recent_turns, 20, "{budget}");
        }
    }

    #[test]
    fn what_is_brought_back_stands_before_the_last_turns_and_only_once() {
        let material = material(20);
        let recalled = [past(3, "message 3".into(), "response 3".into()), material.turns[19].clone()];
        let budget = |tokens| Budget { tokens, last_turns: 2 };
        let context = assemble(&material, "", Some("Now?"), &recalled, budget(160));
        let all = texts(&context);
        assert_eq!(&all[1..3], ["message 3", "response 3"]);
        assert_eq!(context.included.recalled_turns, 1);
        assert_eq!(all.iter().filter(|text| **text == "message 20").count(), 1);
        assert!(!all.contains(&"message 4"));
        // Where there is room for everything, everything stands in its place.
        let whole = assemble(&material, "", Some("Now?"), &recalled, budget(8000));
        assert_eq!(whole, assemble(&material, "", Some("Now?"), &[], budget(8000)));
    }

    #[test]
    fn facts_that_bear_on_the_message_come_before_newer_ones() {
        let mut material = material(0);
        let fact =
            |i: i64| Fact { key: format!("pet_{i}"), value: json!(format!("a very nice cat number {i}")) };
        material.facts = (0..50).map(fact).collect();
        material.facts[7] = Fact { key: "sister".into(), value: json!("Anna, who plays the cello") };
        let budget = Budget { tokens: 120, last_turns: 2 };
        let context = assemble(&material, "", Some("Which instrument does my sister play?"), &[], budget);
        let system = &context.messages[0].content;
        assert!(
            system.contains("- sister: Anna") && system.contains("pet 49") && !system.contains("pet 0:"),
            "{system}"
        );
        assert_eq!(context.included.facts + context.dropped.facts, 50);
    }

    #[test]
    fn a_message_over_the_budget_goes_alone() {
        let budget = Budget { tokens: 1, last_turns: 2 };
        let context = assemble(&material(3), "Be helpful.", Some("A long message indeed"), &[], budget);
        assert_eq!(context.messages, [Message::new(Role::User, "A long message indeed")]);
    }

    fn any_text(length: usize) -> impl Strategy<Value = String> {
        prop_oneof!["[a-z ]{0,40}", "\\PC{0,40}", "[日本語ä\u{1f468}\n ]{0,40}"]
            .prop_map(move |text| text.repeat(length))
    }

    fn any_material() -> impl Strategy<Value = Material> {
        let facts = prop::collection::vec(("[a-z_]{1,20}", any_text(2)), 0..30);
        let turns = prop::collection::vec((any_text(3), any_text(8)), 0..30);
        let profile = ("low|medium|high", "casual|neutral|technical", "shallow|normal|advanced");
        let rest = (prop::option::of(any_text(5)), prop::option::of(any_text(5)), any_text(4), 0..50i64);
        (facts, turns, profile, rest).prop_map(
            |(facts, turns, profile, (system_prompt, summary, state, gone))| Material {
                system_prompt,
                profile: BehaviorProfile { verbosity: profile.0, tone: profile.1, depth: profile.2 },
                working_memory: json!({"state": state}).to_string(),
                summary,
                summary_through: None,
                takings: 0,
                facts: facts.into_iter().map(|(key, value)| Fact { key, value: value.into() }).collect(),
                all_turns: gone + count(turns.len()),
                next_turn: None,
                turns: (gone + 1..)
                    .zip(turns)
                    .map(|(i, (message, response))| past(i, message, response))
                    .collect(),
            },
        )
    }

    proptest! {
        #[test]
        fn no_budget_is_exceeded_whatever_the_history(
            material in any_material(),
            recalled in prop::collection::vec((1..40i64, any_text(3), any_text(3)), 0..6),
            message in any_text(3),
            more in 0..3000i64,
            last_turns in 0..10usize,
        ) {
            let budget = Budget { tokens: cost_of_message(&message) + more, last_turns };
            let known = |turn| material.turns.iter().find(|known| known.turn == turn).cloned();
            let recalled = recalled.into_iter().map(|(turn, m, r)| known(turn).unwrap_or_else(|| past(turn, m, r)));
            let recalled: Vec<_> = recalled.collect();
            let context = assemble(&material, "Be helpful.", Some(&message), &recalled, budget);
            let counted: i64 = context.messages.iter().map(|message| cost_of_message(&message.content)).sum();
            prop_assert_eq!(context.tokens, counted);
            prop_assert!(counted <= budget.tokens, "{} of {}", counted, budget.tokens);
            prop_assert_eq!(&context.messages.last().unwrap().content, &message);
            let talk: Vec<_> = context.messages.iter().map(|m| m.role).skip_while(|r| *r == Role::System).collect();
            prop_assert!(talk.windows(2).all(|pair| pair[0] != pair[1]));
            prop_assert!(talk.iter().all(|role| *role != Role::System) && talk.first() == Some(&Role::User));
            prop_assert_eq!(context.included.facts + context.dropped.facts, count(material.facts.len()));
        }
    }
}
