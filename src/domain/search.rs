//! What a text is found by, and how well it answers a question.
//!
//! Words, stems and stop words are made here, not by the databases, so that both find the same and rank alike.
//! Ranking is BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009) over the messages and
//! responses of a conversation, each of which also gets a share of its neighbours' scores: an answer often stands
//! next to the words it is found by.

use std::{
    collections::{BTreeSet, HashSet},
    ops::Range,
    sync::LazyLock,
};

use rust_stemmers::{Algorithm, Stemmer};
use unicode_normalization::{UnicodeNormalization, char::is_combining_mark};

use super::{
    caller::TenantId,
    ids::{self, SessionId},
    session::UserId,
};

/// Noted once every turn has its entry.
pub const VERSION: i64 = 1;

/// The longest term, in bytes; of longer words the beginning counts.
const MAX_TERM: usize = 64;
/// The most distinct terms of one turn.
const MAX_TERMS: usize = 8000;
/// The most terms of a question that count.
const MAX_ASKED: usize = 32;

/// How fast more occurrences of a term stop counting, and how much long texts are held back: BM25's k1 and b.
const SATURATION: f64 = 1.2;
const LENGTH: f64 = 0.4;
/// What a message gets of the scores of those one, two and three steps away from it.
const NEIGHBOURS: [f64; 3] = [0.5, 0.25, 0.12];

/// Words that say nothing about what a text is about, with their contractions as [`Words`] reads them.
static STOP_WORDS: LazyLock<HashSet<&str>> = LazyLock::new(|| {
    "a about above after again all also am an and any are arent as at be because been before being \
    below between both but by can cant cannot could couldnt did didnt do does doesnt doing dont down during each few for \
    from further had hadnt has hasnt have havent having he hed hell her here heres hers herself him himself his how hows \
    i id if ill im in into is isnt it its itself ive just let lets me more most mustnt my myself no nor not of off oh ok \
    okay on once only or other ought our ours ourselves out over own please same shall shant she shed shes should shouldnt \
    so some such tell than that thats the their theirs them themselves then there theres these they theyd theyll theyre \
    theyve this those through to too under until up very was wasnt we wed well were werent weve what whats when whens \
    where wheres which while who whom whos why whys will with wont would wouldnt yeah yes you youd youll your youre yours \
    yourself yourselves youve"
        .split(' ')
        .collect()
});

/// A word of a text, in the form it is compared in.
struct Word {
    /// Where it stands, in bytes.
    at: Range<usize>,
    /// Lower case, without accents and apostrophes.
    text: String,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Of a script that parts its words.
    Word,
    /// One character of a script that does not.
    Character,
    /// Two such characters that stand together.
    Pair,
}

/// Whether a character belongs to a script that does not part its words by spaces, or (Hangul) glues particles to
/// them: Thai to Khmer, and East Asian.
fn is_unparted(c: char) -> bool {
    matches!(c, '\u{e00}'..='\u{eff}' | '\u{1000}'..='\u{109f}' | '\u{1780}'..='\u{17ff}' | '\u{2e80}'..='\u{312f}'
        | '\u{3130}'..='\u{9fff}' | '\u{ac00}'..='\u{d7ff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}')
        && (c.is_alphanumeric() || is_combining_mark(c))
}

/// Hands the words of `text` to `each`, in order; those that `worth` refuses by their first character are left out.
fn words(text: &str, worth: impl Fn(char) -> bool, mut each: impl FnMut(Word)) {
    let mut chars = text.char_indices().peekable();
    // The unparted character just before, if there is one.
    let mut before: Option<(usize, char)> = None;
    while let Some((start, c)) = chars.next() {
        if is_unparted(c) {
            let end = start + c.len_utf8();
            if let Some((first, with)) = before.filter(|(_, with)| worth(*with)) {
                each(Word { at: first..end, text: String::from_iter([with, c]), kind: Kind::Pair });
            }
            if worth(c) {
                each(Word { at: start..end, text: c.into(), kind: Kind::Character });
            }
            before = Some((start, c));
            continue;
        }
        before = None;
        if !c.is_alphanumeric() {
            continue;
        }
        let mut end = start + c.len_utf8();
        while let Some((at, next)) = chars.peek().copied() {
            let goes_on = !is_unparted(next)
                && (next.is_alphanumeric()
                    || is_combining_mark(next)
                    || (is_apostrophe(next)
                        && text[at + next.len_utf8()..].starts_with(char::is_alphanumeric)));
            if !goes_on {
                break;
            }
            end = at + next.len_utf8();
            chars.next();
        }
        let first = if c.is_ascii() { c.to_ascii_lowercase() } else { folded(c).next().unwrap_or(c) };
        if worth(first) {
            each(Word { at: start..end, text: plain(&text[start..end]), kind: Kind::Word });
        }
    }
}

fn is_apostrophe(c: char) -> bool {
    matches!(c, '\'' | '’' | '‘' | 'ʼ')
}

/// A character in lower case, without accents.
fn folded(c: char) -> impl Iterator<Item = char> {
    c.to_lowercase().nfkd().flat_map(char::to_lowercase).filter(|c| c.is_alphanumeric())
}

/// A word in the form it is compared in.
fn plain(word: &str) -> String {
    let owner = word.strip_suffix(['s', 'S']).and_then(|rest| rest.strip_suffix(is_apostrophe));
    let mut plain = String::with_capacity(word.len());
    for c in owner.unwrap_or(word).chars() {
        match c {
            'a'..='z' | '0'..='9' => plain.push(c),
            'A'..='Z' => plain.push(c.to_ascii_lowercase()),
            c => plain.extend(folded(c)),
        }
        if plain.len() >= MAX_TERM {
            break;
        }
    }
    while plain.len() > MAX_TERM {
        plain.pop();
    }
    plain
}

/// What words of one meaning have in common.
fn stem(stemmer: &Stemmer, word: &Word) -> String {
    match word.kind {
        Kind::Word if word.text.is_ascii() => stemmer.stem(&word.text).into_owned(),
        _ => word.text.clone(),
    }
}

/// What a turn is found by, and what is looked for: a digest of a stem, so that no index keeps words of what was erased.
/// Its ten characters of five bits each make two of a million stems meet once in two thousand times; ranking tells them
/// apart.
pub fn digest(stem: &str) -> String {
    const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let bits = ids::digest(&[stem]).cast_unsigned();
    (0..10).map(|i| char::from(DIGITS[usize::try_from(bits >> (5 * i) & 31).unwrap_or(0)])).collect()
}

/// What a turn says: the distinct stems of its texts, in alphabetical order.
pub fn terms(texts: [&str; 2]) -> BTreeSet<String> {
    let stemmer = Stemmer::create(Algorithm::English);
    let mut terms = BTreeSet::new();
    for text in texts {
        words(
            text,
            |_| true,
            |word| {
                if terms.len() < MAX_TERMS && !word.text.is_empty() && !STOP_WORDS.contains(&*word.text) {
                    terms.insert(stem(&stemmer, &word));
                }
            },
        );
    }
    terms
}

/// Where to look. Each is a term of its own, beginning with an underscore, which no word does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    Tenant,
    User(UserId),
    Session(SessionId),
}

impl Scope {
    pub fn term(&self, tenant: TenantId) -> String {
        match self {
            Self::Tenant => format!("_t{}", tenant.number()),
            Self::User(user) => format!("_u{:016x}_{}", ids::digest(&[user.as_str()]), tenant.number()),
            Self::Session(session) => format!("_{session}_{}", tenant.number()),
        }
    }
}

/// What is looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Question {
    terms: Vec<String>,
    /// Words that must stand one after the other: their stems, stop words included.
    phrases: Vec<Vec<String>>,
}

/// How often the terms of a question stand in one message or response.
#[derive(Clone, Debug, PartialEq)]
pub struct Counts {
    /// By the terms of the question, in their order.
    pub terms: Vec<u32>,
    /// By its phrases.
    pub phrases: Vec<bool>,
}

impl Question {
    /// Reads any text: words, and `"phrases"` between quotation marks, which must stand as they are.
    pub fn parse(text: &str) -> Self {
        let mut question = Self::default();
        let quoted = |c| matches!(c, '"' | '“' | '”' | '„');
        let pieces: Vec<&str> = text.split(quoted).collect();
        let last = pieces.len() - 1;
        for (i, piece) in pieces.into_iter().enumerate() {
            let terms = question.read(piece);
            // A mark that is not closed opens nothing.
            if i % 2 == 1 && i < last && terms.len() > 1 {
                question.phrases.push(terms);
            }
        }
        question
    }

    /// The same of a text whose quotation marks mean nothing here.
    pub fn words(text: &str) -> Self {
        Self { phrases: Vec::new(), ..Self::parse(text) }
    }

    /// Adds the terms of a piece; its stems in order, stop words included.
    fn read(&mut self, piece: &str) -> Vec<String> {
        let stemmer = Stemmer::create(Algorithm::English);
        let (mut sequence, mut found) = (Vec::new(), Vec::new());
        words(piece, |_| true, |word| found.push(word));
        for (i, word) in found.iter().enumerate() {
            let stemmed = stem(&stemmer, word);
            if word.kind != Kind::Pair {
                sequence.push(stemmed.clone());
            }
            // A lone character counts by itself; of several, their pairs.
            let paired = |other: Option<&Word>| other.is_some_and(|other| other.kind == Kind::Pair);
            let alone = word.kind == Kind::Character
                && !paired(i.checked_sub(1).and_then(|before| found.get(before)))
                && !paired(found.get(i + 1));
            let counts = alone || (word.kind != Kind::Character && !word.text.is_empty());
            let known = self.terms.contains(&stemmed);
            if counts && !known && !STOP_WORDS.contains(&*word.text) && self.terms.len() < MAX_ASKED {
                self.terms.push(stemmed);
            }
        }
        sequence
    }

    /// The terms, none twice; empty if nothing of the text can be looked for.
    pub fn terms(&self) -> &[String] {
        &self.terms
    }

    /// The terms that must all be there for the phrases to be.
    pub fn required_terms(&self) -> Vec<&String> {
        self.terms.iter().filter(|term| self.phrases.iter().any(|phrase| phrase.contains(term))).collect()
    }

    /// Counts what of the question stands in a text.
    pub fn count(&self, text: &str) -> Counts {
        let stemmer = Stemmer::create(Algorithm::English);
        let mut counts =
            Counts { terms: vec![0; self.terms.len()], phrases: vec![false; self.phrases.len()] };
        // Stems begin as their words do: most words need not be stemmed. A phrase needs every word.
        let begins = |c| self.terms.iter().any(|term| term.starts_with(c));
        let mut sequence = Vec::new();
        words(
            text,
            |c| !self.phrases.is_empty() || begins(c),
            |word| {
                let stemmed = stem(&stemmer, &word);
                if let Some(term) = self.terms.iter().position(|term| *term == stemmed) {
                    counts.terms[term] += 1;
                }
                if !self.phrases.is_empty() && word.kind != Kind::Pair {
                    sequence.push(stemmed);
                }
            },
        );
        for (phrase, found) in self.phrases.iter().zip(&mut counts.phrases) {
            *found = sequence.windows(phrase.len()).any(|window| window == phrase);
        }
        counts
    }

    /// A piece of `text` of about `length` characters around the most of the question's words.
    pub fn snippet(&self, text: &str, length: usize) -> String {
        let stemmer = Stemmer::create(Algorithm::English);
        let begins = |c| self.terms.iter().any(|term| term.starts_with(c));
        let mut places = Vec::new();
        words(text, begins, |word| {
            let stemmed = stem(&stemmer, &word);
            if let Some(term) = self.terms.iter().position(|term| *term == stemmed) {
                places.push((word.at.start, term));
            }
        });
        // The place from which the most different terms follow within the length.
        let follow = |(i, (start, _)): (usize, &(usize, usize))| {
            let near = places[i..].iter().take(64).take_while(|(at, _)| at - start < length);
            near.map(|(_, term)| term).collect::<BTreeSet<_>>().len()
        };
        let best =
            places.iter().enumerate().rev().max_by_key(|place| follow(*place)).map_or(0, |(_, (at, _))| *at);
        excerpt(text, best, length)
    }
}

/// A piece of `text` that begins some words before byte `around`, cut at white space where there is some.
fn excerpt(text: &str, around: usize, length: usize) -> String {
    let lead = length / 4;
    let start = text[..around].char_indices().rev().nth(lead).map_or(0, |(at, _)| at);
    let start = match text[start..around].find(char::is_whitespace) {
        Some(space) if start > 0 => start + space,
        _ => start,
    };
    let end = text[start..].char_indices().nth(length).map_or(text.len(), |(at, _)| start + at);
    let end = match text[start..end].rfind(char::is_whitespace) {
        Some(space) if end < text.len() && space > length / 2 => start + space,
        _ => end,
    };
    let (before, after) = (if start > 0 { "…" } else { "" }, if end < text.len() { "…" } else { "" });
    format!("{before}{}{after}", text[start..end].trim())
}

/// How much each term says, by how rare it is: BM25's idf. Of `texts` texts in all, `found[i]` hold term `i`.
pub fn rarity(texts: i64, found: &[i64]) -> Vec<f64> {
    #[expect(clippy::cast_precision_loss, reason = "counts of rows")]
    let weight = |found: &i64| {
        let missing = (texts - found).max(0) as f64;
        (1.0 + (missing + 0.5) / (*found as f64 + 0.5)).ln()
    };
    found.iter().map(weight).collect()
}

/// A message or a response that may answer a question.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Where it stands: session, turn, and whether it is the response.
    pub place: (i64, i64, bool),
    pub counts: Vec<u32>,
    /// Its length in tokens.
    pub tokens: i64,
}

impl Candidate {
    /// Whether it holds any word of the question itself.
    pub fn matches(&self) -> bool {
        self.counts.iter().any(|count| *count > 0)
    }
}

/// Scores candidates, which must be in the order of their places; the same order.
pub fn score(candidates: &[Candidate], rarity: &[f64]) -> Vec<f64> {
    let matching = || candidates.iter().filter(|candidate| candidate.matches());
    #[expect(clippy::cast_precision_loss, reason = "lengths of texts")]
    let mean = matching().map(|c| c.tokens as f64).sum::<f64>() / (matching().count().max(1) as f64);
    let own: Vec<f64> = candidates.iter().map(|candidate| bm25(candidate, rarity, mean.max(1.0))).collect();
    let positions = positions(candidates);
    let share = |i: usize, j: usize| {
        let steps = positions[i].abs_diff(positions[j]);
        NEIGHBOURS.get(steps - 1).map(|weight| own[j] * weight)
    };
    let shares = |i: usize| -> f64 {
        let before = (0..i).rev().map_while(|j| share(i, j));
        let after = (i + 1..own.len()).map_while(|j| share(i, j));
        before.chain(after).sum()
    };
    (0..own.len()).map(|i| own[i] + shares(i)).collect()
}

/// How many messages and responses into the conversations each candidate stands. What was not found is not here; the
/// turns between are taken to have as many parts as those that are.
fn positions(candidates: &[Candidate]) -> Vec<usize> {
    let parts = if candidates.iter().any(|candidate| candidate.place.2) { 2 } else { 1 };
    let mut at = 0;
    let mut positions = vec![at; candidates.len().min(1)];
    for pair in candidates.windows(2) {
        let [(session, turn, _), (next_session, next_turn, _)] = [pair[0].place, pair[1].place];
        let between = usize::try_from(next_turn - turn - 1).unwrap_or(0).min(NEIGHBOURS.len());
        at += if session == next_session { 1 + between * parts } else { NEIGHBOURS.len() + 1 };
        positions.push(at);
    }
    positions
}

fn bm25(candidate: &Candidate, rarity: &[f64], mean: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "lengths of texts")]
    let length = 1.0 - LENGTH + LENGTH * candidate.tokens as f64 / mean;
    let term = |(count, weight): (&u32, &f64)| {
        let count = f64::from(*count);
        weight * count * (SATURATION + 1.0) / (count + SATURATION * length)
    };
    candidate.counts.iter().zip(rarity).map(term).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(text: &str) -> Vec<String> {
        terms([text, ""]).into_iter().collect()
    }

    #[test]
    fn words_are_found_by_their_stems_without_accents_case_and_stop_words() {
        for (text, expected) in [
            ("What did the cats do?", &["cat"][..]),
            ("Running, ran, RUNS", &["ran", "run"]),
            ("John’s and John's dogs", &["dog", "john"]),
            ("O'Brien doesn't", &["obrien"]),
            ("Café Zoë naïve e\u{301}te\u{301}", &["cafe", "ete", "naiv", "zoe"]),
            ("Straße ΣΊΣΥΦΟΣ", &["straße", "σισυφοσ"]),
            ("snake_case 3.14 C++", &["14", "3", "c", "case", "snake"]),
            ("東京タワー", &["タ", "タワ", "ワ", "ワー", "ー", "京", "京タ", "東", "東京"]),
            ("猫 and dog", &["dog", "猫"]),
            ("ﬁne ＦＵＬＬ", &["fine", "full"]),
            ("… — ! \u{1F600}", &[]),
        ] {
            assert_eq!(of(text), expected, "{text}");
        }
    }

    #[test]
    fn a_question_has_words_and_phrases() {
        let question = Question::parse("what about the \"Budget Meetings of\" friday \"alone");
        assert_eq!(question.terms(), ["budget", "meet", "friday", "alon"]);
        assert_eq!(question.phrases, [["budget", "meet", "of"]]);
        assert_eq!(question.required_terms(), ["budget", "meet"]);
        assert_eq!(Question::parse("東京").terms(), ["東京"]);
        assert_eq!(Question::parse("猫").terms(), ["猫"]);
        for nothing in ["", "   ", "what is it?", "\"\"", "\" \"", "\"to be or not to be\"", "()*:^-"] {
            assert!(Question::parse(nothing).terms().is_empty(), "{nothing}");
        }
    }

    #[test]
    fn a_phrase_stands_as_it_was_quoted() {
        let question = Question::parse("\"cat of the house\"");
        assert!(question.count("The cats of the houses!").phrases[0]);
        assert!(!question.count("The house of the cat").phrases[0]);
        assert!(!question.count("cat house").phrases[0]);
        assert!(Question::parse("\"東京タワー\"").count("私は東京タワーへ").phrases[0]);
    }

    #[test]
    fn a_snippet_shows_where_the_words_stand() {
        let text = format!(
            "{} We adopted a dog named Rex. {}",
            "Something else. ".repeat(100),
            "More. ".repeat(100)
        );
        let snippet = Question::parse("which dog was adopted").snippet(&text, 60);
        assert!(
            snippet.contains("adopted a dog named Rex") && snippet.starts_with('…') && snippet.ends_with('…'),
            "{snippet}"
        );
        assert_eq!(Question::parse("dog").snippet("A dog.", 60), "A dog.");
        assert_eq!(Question::parse("cat").snippet("", 60), "");
    }

    #[test]
    fn rare_words_weigh_more_and_neighbours_share() {
        let candidate = |turn, counts: [u32; 2]| Candidate {
            place: (1, turn, false),
            counts: counts.to_vec(),
            tokens: 10,
        };
        let candidates = [candidate(1, [1, 0]), candidate(2, [0, 1]), candidate(9, [0, 1])];
        let scores = score(&candidates, &rarity(1000, &[500, 2]));
        assert!(scores[1] > scores[2] && scores[2] > scores[0], "{scores:?}");
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "(?s:.{0,200})", question in "(?s:.{0,200})") {
            let question = Question::parse(&question);
            for term in of(&text).iter().chain(question.terms()) {
                // What the databases' own languages would read as something else must not stand in a term.
                prop_assert!(!term.is_empty() && term.len() <= 2 * MAX_TERM, "{term:?}");
                prop_assert!(term.chars().all(|c| c.is_alphanumeric() || is_combining_mark(c)), "{term:?}");
            }
            question.count(&text);
            prop_assert!(question.snippet(&text, 40).chars().count() <= 42);
        }

        #[test]
        fn what_is_asked_as_it_was_said_is_found(text in "[a-z東京ä ]{1,80}") {
            let said = terms([&text, ""]);
            prop_assert!(Question::parse(&text).terms().iter().all(|term| said.contains(term)));
        }
    }
}
