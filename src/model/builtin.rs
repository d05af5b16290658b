//! The built-in responder: a few rules that answer where no model is connected, so that ATLUS can be tried,
//! developed and tested without a network or a model file.
//!
//! It greets, remembers what users plainly say about themselves, repeats and recaps, and otherwise says what it
//! is and how to connect a real model. It answers from the assembled context and nothing else: the same messages
//! always give the same answer. It reads English only and does not guess: a clause teaches it something only if
//! it begins as one of [`STATEMENTS`] does, so what is quoted, asked, reported, denied or supposed does not.

use futures_util::future::BoxFuture;

use super::{Ask, Error, Listener, Model, Reply};
use crate::domain::prompt::{Message, Role};

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
/// Words that a name, a value, or what has a value may be long.
const MAX_WORDS: (usize, usize, usize) = (4, 12, 4);

/// Facts that one message may teach, and that are known at most: enough for people.
const MAX_FACTS: (usize, usize) = (16, 200);

/// What a clause that begins so says about the user.
const STATEMENTS: [(&str, Says); 18] = [
    ("my name is ", Says::Name),
    ("my name's ", Says::Name),
    ("i am called ", Says::Name),
    ("call me ", Says::Name),
    ("you can call me ", Says::Name),
    ("everyone calls me ", Says::Name),
    ("i am ", Says::PerhapsName),
    ("i live in ", Says::Verb("live in")),
    ("i work as ", Says::Verb("work as")),
    ("i work at ", Says::Verb("work at")),
    ("i work for ", Says::Verb("work for")),
    ("i come from ", Says::Verb("come from")),
    ("i do not like ", Says::Verb("don't like")),
    ("i hate ", Says::Verb("don't like")),
    ("i like ", Says::Verb("like")),
    ("i really like ", Says::Verb("like")),
    ("i love ", Says::Verb("like")),
    ("my ", Says::Thing),
];

#[derive(Clone, Copy)]
enum Says {
    Name,
    /// "I am John", but not "I am tired".
    PerhapsName,
    /// "I live in Berlin".
    Verb(&'static str),
    /// "My favourite colour is blue".
    Thing,
}

/// Words that may stand before a statement or a question without changing it.
const LEADS: [&str; 26] = [
    "hi", "hello", "hey", "greetings", "atlus", "there", "well", "so", "ok", "okay", "oh", "actually",
    "sorry", "please", "and", "but", "no", "yes", "yeah", "by", "btw", "now", "also", "remember", "thanks",
    "again",
];
const GREETINGS: [&str; 8] =
    ["hi", "hello", "hey", "greetings", "good morning", "good afternoon", "good evening", "good day"];
/// Somebody else's words or a supposition: the whole sentence teaches nothing.
const REPORTED: [&str; 13] = [
    " said", " says", " say ", " told", " asked", " thinks", " if ", " suppose", " imagine", " pretend",
    " lyric", " translate", " repeat ",
];
/// What no name begins with.
const NO_NAMES: [&str; 46] = [
    "a", "about", "afraid", "american", "an", "back", "british", "busy", "chinese", "done", "english",
    "fine", "french", "from", "german", "glad", "good", "great", "happy", "hard", "here", "hungry", "in",
    "italian", "japanese", "later", "lost", "maybe", "never", "no", "not", "ok", "okay", "old", "ready",
    "russian", "sad", "sick", "so", "sorry", "sure", "the", "tired", "very", "well", "what",
];

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
    let mut known = Known::default();
    for message in earlier {
        match message.role {
            Role::System => known.read_system(&message.content),
            Role::User => drop(known.learn(&message.content)),
            Role::Assistant => {}
        }
    }
    let notes = known.learn(text);
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
            Some(name) => format!("{greeting}, {name}!"),
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

/// What is known about the user, in the order it was told.
#[derive(Default)]
struct Known(Vec<(String, String)>);

impl Known {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| same(known, key)).map(|(_, value)| value.as_str())
    }

    /// The newest statement counts; likings add up.
    fn set(&mut self, key: &str, value: &str) {
        let several = ["like", "don't like"].contains(&key);
        if several {
            self.0.retain(|(k, v)| {
                !(["like", "don't like"].contains(&k.as_str()) && v.eq_ignore_ascii_case(value))
            });
        } else {
            self.0.retain(|(known, _)| !same(known, key));
        }
        self.0.push((key.to_owned(), value.to_owned()));
    }

    /// Reads the section on the user that the context may hold.
    fn read_system(&mut self, text: &str) {
        let section = text.lines().skip_while(|line| *line != "What is known about the user:").skip(1);
        for (key, value) in section.map_while(|line| line.strip_prefix("- ")?.split_once(": ")) {
            let key = key.replace('_', " ");
            self.set(VERBS.iter().find(|(fact, _)| *fact == key).map_or(&key, |(_, verb)| verb), value);
        }
    }

    /// Learns from a user's message; what to say about each thing learnt.
    fn learn(&mut self, text: &str) -> Vec<String> {
        let mut notes = Vec::new();
        for sentence in sentences(text) {
            let words = format!(" {} ", sentence.words);
            if REPORTED.iter().any(|word| words.contains(word)) {
                continue;
            }
            let mut clauses: Vec<_> = clauses(sentence.text).collect();
            if sentence.is_question {
                // "My name is John, what's yours?" still states something before it asks.
                clauses.truncate(clauses.len().saturating_sub(2));
            }
            for clause in clauses {
                if notes.len() == MAX_FACTS.0 || self.0.len() == MAX_FACTS.1 {
                    return notes;
                }
                let Some((key, value)) = statement(clause) else {
                    continue;
                };
                self.set(&key, &value);
                notes.push(match key.as_str() {
                    "name" => format!("Nice to meet you, {value}."),
                    _ => format!("Noted: {}.", lower_first(&told(&key, &value))),
                });
            }
        }
        notes
    }

    /// Answers a question about the user.
    fn tell(&self, words: &str) -> Option<String> {
        let words = without_leads(words);
        let words = [" again", " please"].iter().find_map(|end| words.strip_suffix(end)).unwrap_or(words);
        if words.len() > 120 {
            return None;
        }
        if ["what do you know about me", "what you know about me"].iter().any(|asked| words.contains(asked)) {
            let all: Vec<_> =
                self.0.iter().map(|(key, value)| format!("\n- {}.", told(key, value))).collect();
            return Some(match all.is_empty() {
                true => "You have not told me anything about yourself yet.".to_owned(),
                false => format!("This is what I know about you:{}", all.concat()),
            });
        }
        let verb = VERB_QUESTIONS.iter().find(|(asked, ..)| words.ends_with(asked));
        if let Some((_, keys, missing)) = verb {
            let facts = self.0.iter().filter(|(key, _)| keys.contains(&key.as_str()));
            let facts: Vec<_> = facts.map(|(key, value)| told(key, value) + ".").collect();
            return Some(if facts.is_empty() {
                format!("You have not told me {missing} yet.")
            } else {
                facts.join(" ")
            });
        }
        let asked = ["who am i", "what am i called"].contains(&words).then_some("name");
        let forms = [
            "what is my ", "what was my ", "when is my ", "who is my ", "tell me my ", "know my ",
            "remember my ", "say my ",
        ];
        let after = |form: &&str| words.find(*form).filter(|at| *at < 40).map(|at| &words[at + form.len()..]);
        let key = asked.or_else(|| forms.iter().find_map(after))?;
        let key = key.trim_end_matches(" is").trim();
        (1..=MAX_WORDS.2).contains(&key.split(' ').count()).then(|| match self.get(key) {
            Some(value) => told(key, value) + ".",
            None => format!("You have not told me your {key} yet."),
        })
    }
}

/// How facts that the context names are said of the user.
const VERBS: [(&str, &str); 7] = [
    ("likes", "like"),
    ("dislikes", "don't like"),
    ("lives in", "live in"),
    ("location", "live in"),
    ("works as", "work as"),
    ("works at", "work at"),
    ("comes from", "come from"),
];
/// Questions, the facts that answer them, and what is missing where there are none.
const VERB_QUESTIONS: [(&str, &[&str], &str); 6] = [
    ("where do i live", &["live in"], "where you live"),
    ("where do i work", &["work at", "work for"], "where you work"),
    ("what do i do", &["work as", "work at", "work for"], "what you do"),
    ("where do i come from", &["come from"], "where you come from"),
    ("what do i not like", &["don't like"], "what you do not like"),
    ("what do i like", &["like"], "what you like"),
];

/// A fact as a sentence without its full stop.
fn told(key: &str, value: &str) -> String {
    let verb = VERBS.iter().any(|(_, verb)| *verb == key) || key == "work for";
    if verb { format!("You {key} {value}") } else { format!("Your {key} is {value}") }
}

fn lower_first(text: &str) -> String {
    text.replacen("You", "you", 1)
}

/// Whether two keys are one, in either spelling of English.
fn same(a: &str, b: &str) -> bool {
    let plain = |key: &str| key.to_lowercase().replace("favourite", "favorite").replace("colour", "color");
    a == b || plain(a) == plain(b)
}

/// A sentence: as it was said, and in plain words.
struct Sentence<'a> {
    text: &'a str,
    /// Lower case, without punctuation, contractions written out.
    words: String,
    is_question: bool,
}

/// The sentences of a text, without code, quotations and quoted lines.
fn sentences(text: &str) -> Vec<Sentence<'_>> {
    let mut sentences = Vec::new();
    let mut in_code = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        } else if !in_code && !line.starts_with(['>', '"', '“', '«', '`']) {
            split_line(line, &mut sentences);
        }
    }
    sentences
}

fn split_line<'a>(line: &'a str, sentences: &mut Vec<Sentence<'a>>) {
    let mut start = 0;
    let ends = line.char_indices().filter(|(at, c)| {
        // A point within a word or after an initial ends nothing.
        match c {
            '!' | '?' | '。' => true,
            '.' if line[at + 1..].starts_with(|next: char| !next.is_whitespace()) => false,
            '.' => line[..*at].rsplit(' ').next().is_none_or(|before| before.chars().nth(1).is_some()),
            _ => false,
        }
    });
    let ends: Vec<_> =
        ends.map(|(at, c)| (at + c.len_utf8(), c == '?')).chain([(line.len(), false)]).collect();
    for (end, is_question) in ends {
        let text = line[start..end].trim();
        start = end;
        let words = plain(text);
        if !words.is_empty() {
            sentences.push(Sentence { text, words, is_question });
        }
    }
}

/// A text in lower case, without punctuation, its contractions written out.
fn plain(text: &str) -> String {
    let text = text.to_lowercase().replace(['’', '‘'], "'");
    let mut plain = String::with_capacity(text.len());
    for word in
        text.split(|c: char| c.is_whitespace() || ",.!?;:()\"“”".contains(c)).filter(|word| !word.is_empty())
    {
        let written_out =
            CONTRACTIONS.iter().find(|(short, _)| *short == word).map_or(word, |(_, long)| long);
        plain.push_str(if plain.is_empty() { "" } else { " " });
        plain.push_str(written_out);
    }
    plain
}

const CONTRACTIONS: [(&str, &str); 10] = [
    ("what's", "what is"),
    ("whats", "what is"),
    ("who's", "who is"),
    ("when's", "when is"),
    ("i'm", "i am"),
    ("don't", "do not"),
    ("where's", "where is"),
    ("it's", "it is"),
    ("im", "i am"),
    ("dont", "do not"),
];

fn without_leads(words: &str) -> &str {
    let mut rest = words;
    while let Some((first, after)) = rest.split_once(' ').or((!rest.is_empty()).then_some((rest, ""))) {
        if !LEADS.contains(&first) {
            return rest;
        }
        rest = after;
    }
    rest
}

/// The parts of a sentence that may each say something: "my name is John, and I live in Berlin".
///
/// Always an even number: each part between commas is cut in two, the second often empty.
fn clauses(sentence: &str) -> impl Iterator<Item = &str> {
    sentence.split([',', ';', ':', '–', '—']).flat_map(|part| {
        let begins = [" and my ", " and i ", " and I ", " and My ", " but my ", " but I ", " but i "];
        let at = begins.iter().filter_map(|begin| part.find(begin)).min();
        let (first, second) = at.map_or((part, ""), |at| part.split_at(at));
        [first, second]
    })
}

/// What a clause says about the user, if it is a plain statement.
fn statement(clause: &str) -> Option<(String, String)> {
    let words = plain(clause);
    let plain_words = without_leads(&words);
    let (begin, says) = STATEMENTS.iter().find(|(begin, _)| plain_words.starts_with(begin))?;
    // The same words as they were written: counted from the end, where nothing was stripped or written out.
    let rest = plain_words[begin.len()..].split(' ').count();
    let written: Vec<&str> = clause.split_whitespace().collect();
    let as_written = |count: usize| {
        let last = written.get(written.len().checked_sub(count)?..)?.join(" ");
        let value = last.trim_matches(|c: char| c.is_whitespace() || ".!?,;:()*_。".contains(c)).to_owned();
        let short = value.split(' ').count() <= MAX_WORDS.1;
        (short && !value.is_empty() && !value.contains(['"', '“', '”', '`'])).then_some(value)
    };
    match says {
        Says::Name => Some(("name".to_owned(), name(&as_written(rest)?)?)),
        Says::PerhapsName => {
            let name = name(&as_written(rest)?)?;
            let ending = ["ing", "ed", "ish", "ese"].iter().any(|ending| name.ends_with(ending));
            let single = rest == 1 && name.chars().next().is_some_and(char::is_uppercase) && !ending;
            (single && name.chars().any(char::is_lowercase)).then(|| ("name".to_owned(), name))
        }
        Says::Verb(key) => {
            let vague = ["it", "that", "this", "how", "to", "you", "when"];
            let value = as_written(rest)?;
            let first = plain(value.split(' ').next()?);
            (!vague.contains(&first.as_str())).then(|| ((*key).to_owned(), value))
        }
        Says::Thing => {
            let (thing, value) = plain_words[begin.len()..].split_once(" is ")?;
            let denied = NO_NAMES.contains(&value.split(' ').next()?) && !thing.starts_with("favo");
            let long =
                thing.split(' ').count() > MAX_WORDS.2 || ["question", "problem", "point"].contains(&thing);
            let thing = thing.strip_suffix(" name").map_or(thing.to_owned(), |owner| format!("{owner} name"));
            (!denied && !long).then_some(())?;
            Some((thing, as_written(value.split(' ').count())?))
        }
    }
}

/// A name at the beginning of a text: a few words of letters, up to one that cannot belong to it.
fn name(text: &str) -> Option<String> {
    let letters = |word: &&str| word.chars().all(|c| c.is_alphabetic() || "'’-.".contains(c));
    let goes_on = |word: &&str| {
        !["and", "from", "by", "but", "or", "is", "if", "when", "please", "what's"].contains(word)
    };
    let words: Vec<_> =
        text.split(' ').take_while(letters).take_while(goes_on).take(MAX_WORDS.0 + 1).collect();
    let first = words.first()?.to_lowercase();
    let fits = words.len() <= MAX_WORDS.0 && !NO_NAMES.contains(&first.as_str());
    fits.then(|| words.join(" ").trim_end_matches('.').to_owned()).filter(|name| !name.is_empty())
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
        let mut known = Known::default();
        known.learn(text);
        known.get("name").unwrap_or_default().to_owned()
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
        let system = "Be brief.\n\nWhat is known about the user:\n- name: John\n- likes: green tea\n- shoe_size: 44\n\n\
             State of the present task:\n- name: Nobody";
        let ask = |says: &str| respond(&[Message::new(Role::System, system), Message::new(Role::User, says)]);
        assert_eq!(ask("What's my name?"), "Your name is John.");
        assert_eq!(ask("What do I like?"), "You like green tea.");
        assert_eq!(ask("What is my shoe size?"), "Your shoe size is 44.");
        assert_eq!(ask("Hi!"), "Hello, John!");
        assert!(ask("My name is Jane. What's my name?").contains("Your name is Jane"));
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
