//! The built-in responder: a few rules that answer where no model is connected, so that ATLUS can be tried,
//! developed and tested without a network or a model file.
//!
//! It greets, remembers what users plainly say about themselves, repeats and recaps, and otherwise says what it
//! is and how to connect a real model. It answers from the assembled context and nothing else: the same messages
//! always give the same answer. It reads English only.

use std::cell::OnceCell;

use futures_util::future::BoxFuture;

use super::{Ask, Error, Listener, Model, Reply};
use crate::domain::{
    prompt::{Message, Role},
    sentences::{Sentence, own_sentences, plain, sentences, without_leads},
    statements::{DISLIKES, LIKES, Statement, key, read_line, statements},
};

/// Answers without a model.
pub struct Builtin;

/// The characters that a token of a reply is.
const CHARS_PER_TOKEN: usize = 4;

impl Model for Builtin {
    fn provider(&self) -> &'static str {
        "builtin"
    }

    fn name(&self) -> &'static str {
        "builtin"
    }

    fn follows_instructions(&self) -> bool {
        false
    }

    /// Answers whatever model was asked for, and says that it is itself. A limit of tokens cuts its answer; a
    /// temperature means nothing to rules.
    fn reply<'a>(&'a self, ask: &'a Ask, listener: &'a dyn Listener) -> BoxFuture<'a, Result<Reply, Error>> {
        Box::pin(async move {
            let mut text = respond(&ask.messages);
            if let Some(most) = ask.options.max_tokens.and_then(|most| usize::try_from(most).ok()) {
                text = text.chars().take(most.saturating_mul(CHARS_PER_TOKEN)).collect();
            }
            if ask.stream {
                text.split_inclusive(' ').for_each(|word| listener.hear(word));
            }
            Ok(Reply { text, model: self.name().to_owned(), usage: None })
        })
    }
}

const WHO: &str = "I am ATLUS's built-in responder, a few rules and no language model.";
const CANNOT: &str = "I am ATLUS's built-in responder and cannot answer that. \
     Set ATLUS_MODEL_URL and ATLUS_MODEL to connect a real model.";
const ABLE: &str = "I can greet you, remember what you tell me about yourself (\"my name is …\", \"I live in …\", \
     \"I like …\"), tell it back, and repeat or recap our conversation. Set ATLUS_MODEL_URL and ATLUS_MODEL to \
     connect a real model.";

/// Messages that a recap lists, and characters it shows of each.
const RECAP: (usize, usize) = (20, 120);
/// Words that what is asked for may be long, and facts that are known at most.
const MAX_WORDS: usize = 4;
const MAX_FACTS: usize = 200;

const GREETINGS: [&str; 8] =
    ["hi", "hello", "hey", "greetings", "good morning", "good afternoon", "good evening", "good day"];

/// Answers the last of `messages`, from all of them.
fn respond(messages: &[Message]) -> String {
    let Some((present, earlier)) = messages.split_last() else {
        return CANNOT.to_owned();
    };
    let said: Vec<&str> =
        earlier.iter().filter(|m| m.role == Role::User).map(|m| m.content.as_str()).collect();
    let text = present.content.trim();
    for lead in ["repeat after me:", "say:", "say "] {
        if let Some(wanted) = text.get(..lead.len()).filter(|start| start.eq_ignore_ascii_case(lead)) {
            let wanted = text[wanted.len()..].trim();
            if !wanted.is_empty() && !wanted.to_lowercase().starts_with("my name") {
                return wanted.to_owned();
            }
        }
    }
    let known = Known { messages, statements: OnceCell::new() };
    let notes: Vec<_> = statements(&own_sentences(text)).iter().map(note).collect();
    let answer =
        |sentence: &Sentence| match topic(&sentence.words) {
            Some(Topic::JustSaid) => Some(match said.last() {
                Some(words) => format!("You just said: \"{words}\""),
                None => "You have not said anything before that.".to_owned(),
            }),
            Some(Topic::JustAnswered) => {
                let last = earlier.iter().rev().find(|m| m.role == Role::Assistant);
                Some(last.map_or("I have not said anything yet.".to_owned(), |m| {
                    format!("I said: \"{}\"", m.content)
                }))
            }
            Some(Topic::Recap) => Some(recap(&said)),
            Some(Topic::Say(words)) => Some(words.to_owned()),
            None => known.tell(&sentence.words),
        };
    let sentences = sentences(text);
    let answers: Vec<_> = sentences.iter().filter_map(answer).collect();

    let mut reply = Vec::new();
    if let Some(greeting) = greeting(text) {
        reply.push(match known.get("name").filter(|_| notes.is_empty()) {
            Some(name) => format!("{greeting}, {}!", name.value),
            None => format!("{greeting}!"),
        });
        if notes.is_empty() && answers.is_empty() {
            let rest = sentences.iter().any(|sentence| !without_leads(&sentence.words).is_empty());
            match (rest, said.is_empty() && known.get("name").is_none()) {
                (true, _) if !is_greeting_only(&sentences) => reply.push(CANNOT.to_owned()),
                (_, true) => reply.push(format!("{WHO} Tell me your name and I will remember it.")),
                _ => {}
            }
        }
    }
    reply.extend(notes);
    reply.extend(answers);
    if reply.is_empty() { CANNOT.to_owned() } else { reply.join(" ") }
}

/// What a sentence asks for that is not a fact.
enum Topic {
    JustSaid,
    JustAnswered,
    Recap,
    Say(&'static str),
}

/// Finds what plain words ask for.
fn topic(words: &str) -> Option<Topic> {
    let all = words;
    let words = without_leads(words);
    let has = |phrases: &[&str]| phrases.iter().any(|phrase| words.contains(phrase));
    let begins = |phrases: &[&str]| phrases.iter().any(|phrase| words.starts_with(phrase));
    if words.len() > 120 {
        None
    } else if words.is_empty() && all.starts_with("thank") {
        Some(Topic::Say("You are welcome."))
    } else if has(&[
        "what did i just say", "what did i say", "what i just said", "what i said", "my last message",
    ]) {
        Some(Topic::JustSaid)
    } else if has(&["what did you just say", "what did you say", "what you said"]) {
        Some(Topic::JustAnswered)
    } else if begins(&["summarize", "summarise", "recap"])
        || has(&["we talk about", "we talked about", "summary of our", "summarize our", "recap our"])
    {
        Some(Topic::Recap)
    } else if begins(&["who are you", "what are you", "are you "]) {
        Some(Topic::Say(WHO))
    } else if words == "help" || has(&["what can you do", "help me", "how do you work"]) {
        Some(Topic::Say(ABLE))
    } else if begins(&["bye", "goodbye", "good bye", "see you"]) {
        Some(Topic::Say("Goodbye!"))
    } else {
        None
    }
}

/// What is known about the user.
struct Known<'a> {
    messages: &'a [Message],
    /// In the order they were told; found when they are asked for, since most messages ask for none.
    statements: OnceCell<Vec<Statement>>,
}

impl Known<'_> {
    fn statements(&self) -> &[Statement] {
        self.statements.get_or_init(|| {
            let mut known: Vec<Statement> = Vec::new();
            for message in self.messages {
                let stated = match message.role {
                    Role::System => read_section(&message.content),
                    Role::User => statements(&own_sentences(&message.content)),
                    Role::Assistant => Vec::new(),
                };
                for statement in stated {
                    // The newest statement of a key counts.
                    known.retain(|known| known.key != statement.key);
                    known.push(statement);
                }
            }
            known.drain(..known.len().saturating_sub(MAX_FACTS));
            known
        })
    }

    fn get(&self, key: &str) -> Option<&Statement> {
        self.statements().iter().find(|known| known.key == key)
    }

    /// Answers a question about the user.
    fn tell(&self, words: &str) -> Option<String> {
        let words = without_leads(words);
        let words = [" again", " please"].iter().find_map(|end| words.strip_suffix(end)).unwrap_or(words);
        if words.len() > 120 {
            return None;
        }
        if ["what do you know about me", "what you know about me"].iter().any(|asked| words.contains(asked)) {
            return Some(self.tell_all());
        }
        let question = QUESTIONS.iter().find(|(asked, ..)| words.ends_with(asked));
        if let Some((_, begins, missing)) = question {
            let facts =
                self.statements().iter().map(|fact| told(fact) + ".").filter(|fact| fact.starts_with(begins));
            let facts: Vec<_> = facts.collect();
            return Some(match facts.is_empty() {
                true => format!("You have not told me {missing} yet."),
                false => facts.join(" "),
            });
        }
        let thing = thing_asked_for(words)?;
        Some(match self.get(&key(thing)) {
            Some(fact) => told(fact) + ".",
            None => format!("You have not told me your {thing} yet."),
        })
    }

    fn tell_all(&self) -> String {
        let all: Vec<_> = self.statements().iter().map(|fact| format!("\n- {}.", told(fact))).collect();
        match all.is_empty() {
            true => "You have not told me anything about yourself yet.".to_owned(),
            false => format!("This is what I know about you:{}", all.concat()),
        }
    }
}

/// Reads the section on the user that the context may hold.
fn read_section(text: &str) -> Vec<Statement> {
    let section = text.lines().skip_while(|line| *line != "What is known about the user:").skip(1);
    section.map_while(|line| line.strip_prefix("- ")).filter_map(read_line).collect()
}

/// What to say about a thing learnt.
fn note(statement: &Statement) -> String {
    match statement.key.as_str() {
        "name" => format!("Nice to meet you, {}.", statement.value),
        _ => format!("Noted: {}.", told(statement).replacen('Y', "y", 1)),
    }
}

/// Questions, how the facts are told that answer them, and what is missing where there are none.
const QUESTIONS: [(&str, &str, &str); 8] = [
    ("where do i live", "You live in ", "where you live"),
    ("where do i work", "You work at ", "where you work"),
    ("what do i do", "You work ", "what you do"),
    ("where do i come from", "You come from ", "where you come from"),
    ("where am i from", "You come from ", "where you come from"),
    ("what do i not like", "You don't like ", "what you do not like"),
    ("what do i like", "You like ", "what you like"),
    ("what am i allergic to", "You are allergic ", "what you are allergic to"),
];

/// The thing of "what is my …".
fn thing_asked_for(words: &str) -> Option<&str> {
    match words {
        "who am i" | "what am i called" => return Some("name"),
        "how old am i" => return Some("age"),
        _ => {}
    }
    let forms = [
        "what is my ", "what was my ", "when is my ", "who is my ", "tell me my ", "know my ",
        "remember my ", "say my ",
    ];
    let after = |form: &&str| words.find(*form).filter(|at| *at < 40).map(|at| &words[at + form.len()..]);
    let thing = forms.iter().find_map(after)?.trim_end_matches(" is").trim();
    (1..=MAX_WORDS).contains(&thing.split(' ').count()).then_some(thing)
}

/// A fact as a sentence without its full stop.
fn told(Statement { key, value }: &Statement) -> String {
    let liking = |verb| value.strip_prefix(verb).filter(|_| key.starts_with("preference:"));
    if let Some(thing) = liking(LIKES) {
        return format!("You like{thing}");
    }
    if let Some(thing) = liking(DISLIKES) {
        return format!("You don't like{thing}");
    }
    match key.as_str() {
        "location" => format!("You live in {value}"),
        "occupation" => format!("You work as {value}"),
        "employer" => format!("You work at {value}"),
        "origin" => format!("You come from {value}"),
        "age" => format!("You are {value} years old"),
        key if key.contains(':') => format!("You are {value}"),
        key => format!("Your {} is {value}", key.replace('_', " ")),
    }
}

/// The greeting that a text begins with, as it is given back.
fn greeting(text: &str) -> Option<&'static str> {
    let words = plain(text.get(..text.len().min(64)).unwrap_or(text));
    let begins = |greeting: &&str| words == *greeting || words.starts_with(&format!("{greeting} "));
    GREETINGS.into_iter().find(begins).map(|greeting| match greeting {
        "good morning" => "Good morning",
        "good afternoon" => "Good afternoon",
        "good evening" => "Good evening",
        _ => "Hello",
    })
}

fn is_greeting_only(sentences: &[Sentence]) -> bool {
    let small_talk =
        ["how are you", "nice to meet you", "good morning", "good afternoon", "good evening", "good day"];
    let only = |sentence: &Sentence| {
        let rest = without_leads(&sentence.words);
        let rest = small_talk.iter().find_map(|talk| rest.strip_prefix(talk)).unwrap_or(rest);
        without_leads(rest.trim_start()).is_empty()
    };
    sentences.iter().all(only)
}

/// The user's messages in short.
fn recap(said: &[&str]) -> String {
    if said.is_empty() {
        return "We have not talked about anything yet.".to_owned();
    }
    let (most, chars) = RECAP;
    let left_out = said.len().saturating_sub(most);
    let mut lines = vec!["So far you said:".to_owned()];
    if left_out > 0 {
        lines.push(format!("({left_out} earlier messages are left out)"));
    }
    for words in &said[left_out..] {
        let line: String = words.split_whitespace().collect::<Vec<_>>().join(" ");
        let cut = line.char_indices().nth(chars).and_then(|(end, _)| line[..end].rfind(' ').or(Some(end)));
        lines.push(match cut {
            Some(end) => format!("- {}…", &line[..end]),
            None => format!("- {line}"),
        });
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The answers to each of the user's messages in turn.
    fn conversation(says: &[&str]) -> Vec<String> {
        let (mut messages, mut answers) = (Vec::new(), Vec::new());
        for say in says {
            messages.push(Message::new(Role::User, *say));
            let answer = respond(&messages);
            messages.push(Message::new(Role::Assistant, answer.as_str()));
            answers.push(answer);
        }
        answers
    }

    fn last(says: &[&str]) -> String {
        conversation(says).pop().unwrap()
    }

    /// The name that a message teaches; empty if none.
    fn name_in(text: &str) -> String {
        let messages = [Message::new(Role::User, text)];
        let known = Known { messages: &messages, statements: OnceCell::new() };
        known.get("name").map(|name| name.value.clone()).unwrap_or_default()
    }

    #[test]
    fn a_name_is_learnt_where_it_is_plainly_stated() {
        for (text, name) in [
            ("my name is John", "John"),
            ("Hi, my name is John", "John"),
            ("Hi my name is John.", "John"),
            ("Hello ATLUS! My name's John!", "John"),
            ("My name’s John", "John"),
            ("MY NAME IS JOHN", "JOHN"),
            ("my name is mary ann smith", "mary ann smith"),
            ("my name is J. R. R. Tolkien", "J. R. R. Tolkien"),
            ("My name is Anne-Marie D’Arcy", "Anne-Marie D’Arcy"),
            ("my name is Zoë", "Zoë"),
            ("my name is 李雷。", "李雷"),
            ("my name is Иван Петров", "Иван Петров"),
            ("Actually my name is Jane", "Jane"),
            ("No, my name is Jane", "Jane"),
            ("My name is John, what's yours?", "John"),
            ("my name is John and I live in Berlin", "John"),
            ("I live in Berlin, and my name is John", "John"),
            ("My name is John from accounting", "John"),
            ("I'm called John", "John"),
            ("Please call me John", "John"),
            ("You can call me John if you like", ""),
            ("I am John", "John"),
            ("Hi, I'm John.", "John"),
            ("I’m Éric", "Éric"),
            ("Nice day.\nMy name is John", "John"),
        ] {
            assert_eq!(name_in(text), name, "{text:?}");
        }
    }

    #[test]
    fn a_name_is_not_learnt_from_what_is_no_plain_statement() {
        for text in [
            "my name is not Bob", "my name isn't Bob", "My name is no longer Bob", "my name is a secret",
            "my name is hard to spell", "my name is 42", "my name is what?", "my name is",
            "he said my name is Bob", "He said, my name is Bob", "my name is Bob, he said",
            "She thinks my name is Bob", "\"my name is Bob\" is a lyric", "“my name is Bob” is a lyric",
            "what if my name is Bob?", "if my name is Bob, I win", "Suppose my name is Bob",
            "is my name Bob?", "my name is Bob?", "Translate this: my name is Bob",
            "```\nmy name is Bob\n```", "`my name is Bob`", "> my name is Bob", "call me later",
            "Call me Maybe", "I am Happy", "I'm fine", "I am German", "I'm Trying", "I am Tired",
            "I AM LOST", "I'm Team Lead", "your name is Bob", "repeat after me: my name is Bob",
        ] {
            assert_eq!(name_in(text), "", "{text:?}");
        }
    }

    #[test]
    fn the_conversation_everyone_tries_first_holds() {
        let answers = conversation(&[
            "Hello, ATLUS!", "Hi, my name is John", "What's my name?", "What did I just say?",
        ]);
        assert!(answers[0].starts_with("Hello! I am ATLUS's built-in responder"), "{}", answers[0]);
        assert_eq!(
            answers[1..],
            ["Hello! Nice to meet you, John.", "Your name is John.", "You just said: \"What's my name?\""]
        );
    }

    #[test]
    fn a_known_name_is_told_however_it_is_asked_for() {
        for question in [
            "What's my name?",
            "What’s my name?",
            "WHAT IS MY NAME",
            "whats my name",
            "what is my name again?",
            "Who am I?",
            "Do you know my name?",
            "do you remember my name",
            "Hello! What's my name?",
            "Hey ATLUS, what's my name, please?",
            "Thanks. What's my name?",
            "Can you tell me what my name is, so: what is my name?",
            "Say my name",
        ] {
            let answer = last(&["my name is John", "I like tea", question]);
            assert!(answer.contains("Your name is John"), "{question:?}: {answer}");
            let unknown = last(&["I like tea", question]);
            assert!(unknown.contains("You have not told me your name yet"), "{question:?}: {unknown}");
        }
    }

    #[test]
    fn the_latest_statement_counts() {
        assert_eq!(
            last(&["my name is John", "Actually, call me Jane", "What's my name?"]),
            "Your name is Jane."
        );
        assert_eq!(
            last(&["I like tea", "I don't like tea", "What do I like?"]),
            "You have not told me what you like yet."
        );
        assert!(last(&["My name is John. What's my name?"]).contains("Your name is John"));
    }

    #[test]
    fn other_facts_are_told_on_request() {
        for (told, asked, answer) in [
            ("I live in Berlin", "Where do I live?", "You live in Berlin."),
            ("my favourite colour is blue", "what is my favorite color?", "Your favorite color is blue."),
            ("my dog's name is Rex", "What is my dog's name?", "Your dog's name is Rex."),
            ("My birthday is May 5", "when is my birthday?", "Your birthday is May 5."),
            ("I work as a nurse", "What do I do?", "You work as a nurse."),
            ("I'm allergic to nuts", "What am I allergic to?", "You are allergic to nuts."),
            ("I am 41", "How old am I?", "You are 41 years old."),
            ("I like tea. I love jazz. I hate rain.", "what do I like?", "You like tea. You like jazz."),
            ("I don't like spiders", "what do I not like?", "You don't like spiders."),
            ("hello", "where do I live?", "You have not told me where you live yet."),
            (
                "my favourite colour is blue",
                "what is my shoe size?",
                "You have not told me your shoe size yet.",
            ),
        ] {
            assert_eq!(last(&[told, asked]), answer, "{told:?} {asked:?}");
        }
        let all = last(&["my name is John and I live in Berlin", "I like tea", "What do you know about me?"]);
        assert_eq!(
            all,
            "This is what I know about you:\n- Your name is John.\n- You live in Berlin.\n- You like tea."
        );
    }

    #[test]
    fn facts_of_the_context_are_used_and_newer_statements_win() {
        let system = "Be brief.\n\nWhat is known about the user:\n- name: John\n- location: Berlin\n- likes green tea\n\
             - does not like java\n- shoe size: 44\n\n\
             State of the present task:\n- name: Nobody";
        let ask = |says: &str| respond(&[Message::new(Role::System, system), Message::new(Role::User, says)]);
        assert_eq!(ask("What's my name?"), "Your name is John.");
        assert_eq!(ask("Where do I live?"), "You live in Berlin.");
        assert_eq!(ask("What do I like?"), "You like green tea.");
        assert_eq!(ask("What do I not like?"), "You don't like java.");
        assert_eq!(ask("What is my shoe size?"), "Your shoe size is 44.");
        assert_eq!(ask("Hi!"), "Hello, John!");
        assert_eq!(
            ask("What do you know about me?"),
            "This is what I know about you:\n- Your name is John.\n- You live in Berlin.\n- You like green tea.\n\
             - You don't like java.\n- Your shoe size is 44."
        );
        assert!(ask("My name is Jane. What's my name?").contains("Your name is Jane"));
        assert!(
            ask("I like Java. What do I not like?")
                .contains("You have not told me what you do not like yet.")
        );
    }

    #[test]
    fn what_the_assistant_or_the_system_prompt_says_teaches_nothing() {
        let messages = [
            Message::new(Role::System, "My name is Bob.\n- name: Bob"),
            Message::new(Role::User, "hi"),
            Message::new(Role::Assistant, "My name is Bob"),
            Message::new(Role::User, "What's my name?"),
        ];
        assert_eq!(respond(&messages), "You have not told me your name yet.");
    }

    #[test]
    fn it_repeats_and_recaps() {
        assert_eq!(last(&["What did I just say?"]), "You have not said anything before that.");
        assert_eq!(last(&["one \"two\"", "Repeat what I said"]), "You just said: \"one \"two\"\"");
        assert_eq!(last(&["Hi", "What did you just say?"]).split(':').next(), Some("I said"));
        assert_eq!(last(&["Repeat after me: a b  c"]), "a b  c");
        assert_eq!(last(&["one", "two", "Recap our conversation"]), "So far you said:\n- one\n- two");
        let long = format!("{}end", "word ".repeat(40));
        let said: Vec<_> =
            std::iter::repeat_n(long.as_str(), 25).chain(["What have we talked about?"]).collect();
        let recap = last(&said);
        assert!(recap.contains("(5 earlier messages are left out)") && recap.ends_with("word…"), "{recap}");
        assert_eq!(recap.lines().count(), 22);
    }

    #[test]
    fn it_says_what_it_is_and_how_to_get_more() {
        assert!(last(&["Who are you?"]).contains("built-in responder"));
        for unknown in ["Write a poem about the sea", "Hello, write a poem", "???", "1+1", "is my name Bob?"]
        {
            assert!(last(&[unknown]).contains("ATLUS_MODEL_URL"), "{unknown}");
        }
        assert_eq!(last(&["my name is John", "Good morning!"]), "Good morning, John!");
        assert_eq!(last(&["hi", "thanks"]), "You are welcome.");
        assert!(last(&["help"]).contains("ATLUS_MODEL_URL"));
    }

    #[test]
    fn no_text_makes_it_panic_or_dawdle() {
        let pieces = [
            "my name is ", "é’", "\u{1F600}", "\n", ". ", "\"", "```", "and I ", "İ", " ", ",", "what is my ",
        ];
        for a in pieces {
            for b in pieces {
                for c in pieces {
                    last(&[&format!("{a}{b}{c}"), &format!("{c}{a}{b}?")]);
                }
            }
            last(&[&a.repeat(32_000 / a.len())]);
        }
        let started = std::time::Instant::now();
        let facts = (0..3000).map(|i| format!("my k{i} is b,")).collect::<Vec<_>>().concat();
        last(&[&facts, &"\u{1F600}".repeat(32_000), &"a.".repeat(16_000), &"! ".repeat(16_000)]);
        // Each took a second or more when it was not linear.
        assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
    }
}
