//! What a text plainly says about its speaker.
//!
//! Rules for English, which would rather miss something than learn what is not so. A clause says something only
//! if it begins as one of [`BEGINNINGS`] does; what is quoted, asked, reported, denied, supposed or long over
//! says nothing.

use super::sentences::{Sentence, Word, is_frame, join, plain, without_leads};

/// Something that a text says of its speaker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// What it is about: `name`, `location`, `occupation`, `employer`, `origin`, `age`, `preference:green tea`,
    /// `allergy:peanuts`, or the thing of "my favourite colour is blue" as [`key`] names it.
    pub key: String,
    /// In the speaker's words.
    pub value: String,
}

/// The statements, and the wishes, that are read in one text: enough for people.
pub const MAX: usize = 16;

/// Characters that a value, and what has a value may be long.
const MAX_CHARS: (usize, usize) = (200, 100);
/// Words that a name, a value, and what has a value may be long.
const MAX_WORDS: (usize, usize, usize) = (4, 12, 4);

/// The statements of sentences that are their speaker's own, in order; at most [`MAX`].
pub fn statements(own: &[Sentence]) -> Vec<Statement> {
    own.iter().flat_map(stated).take(MAX).collect()
}

/// The key of what is called so, in any spelling of English: "favourite colour" is `favorite_color`.
pub fn key(thing: &str) -> String {
    american(&plain(thing)).replace(' ', "_")
}

/// The statement that a fact's line tells, as [`Fact::line`](super::memory::Fact::line) writes it.
pub fn read_line(line: &str) -> Option<Statement> {
    let listed = [("preference", LIKES), ("preference", DISLIKES), ("allergy", ALLERGIC)];
    let thing =
        |(kind, verb): (&'static str, &str)| Some((kind, line.strip_prefix(verb)?.strip_prefix(' ')?));
    if let Some((kind, thing)) = listed.into_iter().find_map(thing) {
        return Some(Statement { key: listed_key(kind, &plain(thing)), value: line.to_owned() });
    }
    let (thing, value) = line.split_once(": ")?;
    Some(Statement { key: key(thing), value: value.to_owned() })
}

/// How the values begin that are kept beside each other, one for each thing.
pub const LIKES: &str = "likes";
pub const DISLIKES: &str = "does not like";
const ALLERGIC: &str = "allergic to";

fn listed_key(kind: &str, thing: &str) -> String {
    format!("{kind}:{}", american(thing))
}

fn american(words: &str) -> String {
    let spellings =
        [("favourite", "favorite"), ("colour", "color"), ("flavour", "flavor"), ("neighbour", "neighbor")];
    spellings
        .into_iter()
        .fold(words.to_owned(), |words, (british, american)| words.replace(british, american))
}

// Words as they were written.

/// Some words in a row.
#[derive(Clone, Copy)]
struct Phrase<'a> {
    text: &'a str,
    words: &'a [Word],
}

/// Words that change nothing between the others of a beginning: "I really like".
const ADVERBS: &[&str] = &[
    "really", "also", "just", "still", "absolutely", "quite", "truly", "actually", "currently", "now",
    "originally", "recently", "mostly", "particularly", "especially", "personally", "totally",
];
/// What a value ends before: another clause begins.
const ENDS: &[&str] = &[
    "but", "because", "cause", "so", "although", "though", "since", "please", "thanks", "btw", "by the way",
    "these days", "at the moment", "right now", "lately",
];
/// What the thing that somebody likes, or the place that they are at, ends before as well.
const EXTENTS: &[&str] = &[
    "than", "more", "better", "too", "very much", "so much", "much", "a lot", "as well", "anymore",
    "any more", "the most", "the best", "now", "nowadays", "either", "again", "at all",
];
/// What no value ends with: it was cut short.
const OPEN: &[&str] = &["the", "a", "an", "of", "and", "to", "not", "or"];

impl<'a> Phrase<'a> {
    fn of(self, words: &'a [Word]) -> Self {
        Self { words, ..self }
    }

    fn plain(self) -> String {
        join(self.words)
    }

    fn first(self) -> &'a str {
        self.words.first().map_or("", |word| &word.plain)
    }

    fn has(self, words: &[&str]) -> bool {
        self.words.iter().any(|word| words.contains(&word.plain.as_str()))
    }

    /// What follows a beginning, which adverbs may stand in.
    fn after(self, beginning: &str) -> Option<Self> {
        let mut words = self.words;
        for expected in beginning.split(' ') {
            let skipped = |word: &Word| ADVERBS.contains(&word.plain.as_str()) && word.plain != expected;
            let at = words.iter().position(|word| !skipped(word))?;
            if words[at].plain != expected {
                return None;
            }
            words = &words[at + 1..];
        }
        Some(self.of(words))
    }

    /// The words before the first of these ends; there is at least one.
    fn up_to(self, ends: &[&str]) -> Self {
        let is = |word: Option<&Word>, expected: &str| word.is_some_and(|word| word.plain == expected);
        let begins =
            |at: usize, end: &str| end.split(' ').zip(at..).all(|(word, at)| is(self.words.get(at), word));
        let at = (1..self.words.len()).find(|at| ends.iter().any(|end| begins(*at, end)));
        self.of(&self.words[..at.unwrap_or(self.words.len())])
    }

    fn without_leads(self) -> Self {
        let plain = self.plain();
        let led = without_leads(&plain);
        let left = if led.is_empty() { 0 } else { led.split(' ').count() };
        self.of(&self.words[self.words.len() - left..])
    }

    /// The words as they were written, if a fact may have them as its value.
    fn written(self) -> Option<String> {
        let (first, last) = (self.words.first()?, self.words.last()?);
        let written = self.text[first.from..last.to].split_whitespace().collect::<Vec<_>>().join(" ");
        let short = self.words.len() <= MAX_WORDS.1 && written.chars().nth(MAX_CHARS.0).is_none();
        let whole =
            !OPEN.contains(&last.plain.as_str()) && !written.contains(|c: char| c == '"' || c.is_control());
        (short && whole).then_some(written)
    }
}

// Facts.

/// How clauses begin that say something of their speaker, and what.
const BEGINNINGS: &[(&str, Says)] = &[
    ("my name is", Says::Name),
    ("my name's", Says::Name),
    ("i am called", Says::Name),
    ("call me", Says::Name),
    ("you can call me", Says::Name),
    ("you may call me", Says::Name),
    ("everyone calls me", Says::Name),
    ("people call me", Says::Name),
    ("my friends call me", Says::Name),
    ("i live in", Says::Place("location")),
    ("i am living in", Says::Place("location")),
    ("i am based in", Says::Place("location")),
    ("i moved to", Says::Place("location")),
    ("i have moved to", Says::Place("location")),
    ("i come from", Says::Place("origin")),
    ("i am from", Says::Place("origin")),
    ("i work as", Says::Occupation),
    ("i am working as", Says::Occupation),
    ("i work at", Says::Employer),
    ("i work for", Says::Employer),
    ("i am working at", Says::Employer),
    ("i am working for", Says::Employer),
    ("i am allergic to", Says::Allergy),
    ("i am very allergic to", Says::Allergy),
    ("i like", Says::Liking(LIKES)),
    ("i love", Says::Liking(LIKES)),
    ("i enjoy", Says::Liking(LIKES)),
    ("i prefer", Says::Preference),
    ("i do like", Says::Liking(LIKES)),
    ("i do not like", Says::Liking(DISLIKES)),
    ("i do not enjoy", Says::Liking(DISLIKES)),
    ("i no longer like", Says::Liking(DISLIKES)),
    ("i dislike", Says::Liking(DISLIKES)),
    ("i hate", Says::Liking(DISLIKES)),
    ("i cannot stand", Says::Liking(DISLIKES)),
    ("i can not stand", Says::Liking(DISLIKES)),
    ("i am", Says::Being),
    ("my", Says::Thing),
];

#[derive(Clone, Copy)]
enum Says {
    Name,
    /// What is kept under this key is where something is: "I live in Berlin".
    Place(&'static str),
    Occupation,
    Employer,
    Allergy,
    Liking(&'static str),
    /// "I prefer tea to coffee".
    Preference,
    /// "I am John" or "I am 41", but not "I am tired".
    Being,
    /// "My favourite colour is blue".
    Thing,
}

/// What a question ends with that asks whether what stands before it is so.
const TAGS: &[&str] = &["right", "correct", "is it", "is not", "is that", "do i", "do not i", "am i", "true"];
/// Those of whom more may be said after "and", instead of the speaker: "I like people who come and live here".
const OTHERS: &[&str] = &["who", "that", "which", "whose", "where", "when"];

fn stated(sentence: &Sentence) -> Vec<Statement> {
    let clauses = sentence.clauses();
    let phrases: Vec<_> =
        clauses.iter().map(|clause| Phrase { text: &sentence.text, words: &clause.words }).collect();
    let (stated, asked) = phrases.split_at(clauses.iter().take_while(|clause| !clause.asked).count());
    if asked.first().is_some_and(|asked| TAGS.iter().any(|tag| asked.after(tag).is_some())) {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut of_speaker = false;
    for (at, phrase) in stated.iter().enumerate() {
        let phrase = phrase.without_leads();
        let given = statement(phrase, of_speaker, &stated[at + 1..]);
        if given.is_empty() && is_frame(&phrase.plain()) {
            break;
        }
        // "I live in Berlin, Germany and work at ACME": a word adds to what stands before it.
        if phrase.words.len() > 1 {
            of_speaker = !given.is_empty() && (of_speaker || phrase.first() == "i") && !phrase.has(OTHERS);
        }
        found.extend(given);
    }
    found
}

/// What a clause says. `of_speaker` is whether it may leave out its "I", as "work at ACME" does in "I live in
/// Berlin and work at ACME".
fn statement(clause: Phrase, of_speaker: bool, following: &[Phrase]) -> Vec<Statement> {
    let begun = |(beginning, says): &(&str, Says)| {
        let without_i = beginning.strip_prefix("i ").filter(|_| of_speaker);
        let rest = clause.after(beginning).or_else(|| clause.after(without_i?))?;
        Some((*says, rest))
    };
    let Some((says, rest)) = BEGINNINGS.iter().find_map(begun) else {
        return Vec::new();
    };
    let one = |key: &str, value: Option<String>| {
        value.map(|value| Statement { key: key.to_owned(), value }).into_iter().collect()
    };
    match says {
        Says::Name => one("name", name(rest)),
        Says::Place(key) => one(key, place(rest)),
        Says::Occupation => one("occupation", occupation(rest)),
        Says::Employer => one("employer", employer(rest)),
        Says::Allergy => each("allergy", ALLERGIC, rest, following),
        Says::Liking(verb) => each("preference", verb, rest, following),
        Says::Preference => each("preference", LIKES, rest.up_to(&["to", "over", "rather"]), following),
        Says::Being => match age(rest) {
            Some(age) => one("age", Some(age)),
            None => one("name", sole_name(rest)),
        },
        Says::Thing => thing(rest).into_iter().collect(),
    }
}

/// What no name begins with.
const NO_NAMES: &[&str] = &[
    "a", "about", "afraid", "an", "back", "busy", "done", "fine", "from", "glad", "good", "great", "happy",
    "hard", "here", "hungry", "in", "later", "lost", "maybe", "never", "no", "not", "ok", "okay", "old",
    "ready", "sad", "sick", "so", "sorry", "sure", "the", "tired", "very", "well", "what",
];
/// Nor this, though "my birthday is on May 5" may.
const NO_CALLS: &[&str] = &[
    "anytime", "being", "common", "crazy", "difficult", "easy", "it", "long", "none", "nobody", "on", "one",
    "pretty", "pronounced", "rare", "short", "sometime", "soon", "spelled", "spelt", "that", "this", "today",
    "tomorrow", "tonight", "too", "unknown", "unusual", "weird", "whatever", "written", "wrong", "spelling",
    "irrelevant", "secret", "available", "blind", "bored", "canadian", "catholic", "deaf", "dutch", "gay",
    "indian", "late", "muslim", "new", "pregnant", "single", "swiss", "vegan", "vegetarian", "american",
    "british", "chinese", "english", "french", "german", "italian", "japanese", "russian",
];
/// What a name ends before.
const NAME_ENDS: &[&str] = &[
    "and", "are", "as", "at", "because", "before", "btw", "but", "by", "can", "could", "do", "for", "from",
    "here", "how", "i", "if", "in", "is", "it", "just", "like", "my", "nice", "not", "now", "on", "or",
    "please", "since", "so", "thanks", "that", "then", "though", "to", "too", "was", "what", "when", "where",
    "which", "who", "why", "will", "with", "would", "you", "your", "lol", "haha", "bro", "dude", "mate",
];

/// The name that a phrase begins with: a few words of letters.
fn name(phrase: Phrase) -> Option<String> {
    let adverbs = phrase.words.iter().take_while(|word| ADVERBS.contains(&word.plain.as_str())).count();
    let phrase = phrase.of(&phrase.words[adverbs..]);
    let belongs = |word: &&Word| {
        !NAME_ENDS.contains(&word.plain.as_str()) && phrase.text[word.from..word.to].chars().all(is_letter)
    };
    let length = phrase.words.iter().take_while(belongs).count();
    let is_name =
        length <= MAX_WORDS.0 && !NO_NAMES.contains(&phrase.first()) && !NO_CALLS.contains(&phrase.first());
    phrase.of(&phrase.words[..length]).written().filter(|_| is_name)
}

/// Whether a character may be in a name: also the marks of scripts that write them apart from the letters.
fn is_letter(c: char) -> bool {
    let marks = ['\u{300}'..='\u{36F}', '\u{900}'..='\u{1FFF}', '\u{200C}'..='\u{200D}'];
    c.is_alphabetic() || "'’-.".contains(c) || marks.iter().any(|marks| marks.contains(&c))
}

/// The name that stands alone after "I am", and looks like one.
fn sole_name(phrase: Phrase) -> Option<String> {
    let name = name(phrase).filter(|_| phrase.words.len() == 1)?;
    let ending = ["ing", "ed", "ish", "ese"].iter().any(|ending| name.ends_with(ending));
    let capital = name.starts_with(char::is_uppercase) && name.contains(char::is_lowercase);
    (capital && !ending).then_some(name)
}

fn age(phrase: Phrase) -> Option<String> {
    let (years, rest) = phrase.up_to(&["now", "today", "and"]).words.split_first()?;
    let rest = phrase.of(rest).plain();
    let units = ["", "years old", "year old", "years of age", "yrs old", "yo", "y/o"];
    let years = years.plain.parse().ok().filter(|years: &u8| (3..=120).contains(years))?;
    units.contains(&rest.as_str()).then(|| years.to_string())
}

/// Words of what is no place, though one says to live in, come from, move to or work at it.
const NO_PLACES: &[&str] = &[
    "a", "ago", "an", "another", "any", "bed", "change", "constant", "dark", "days", "denial", "exile",
    "fear", "food", "free", "full", "fun", "future", "hell", "her", "here", "him", "his", "home", "hope",
    "hours", "its", "it", "least", "living", "long", "luxury", "me", "minutes", "moment", "money", "months",
    "most", "my", "myself", "never", "next", "night", "nights", "no", "not", "nothing", "nowhere", "office",
    "our", "pain", "past", "peace", "peanuts", "poverty", "present", "school", "sin", "some", "such",
    "tears", "that", "their", "them", "there", "this", "time", "times", "weekends", "weeks", "what", "years",
    "you", "your",
];
/// What a place ends before.
const PLACE_ENDS: &[&str] = &[
    "a", "about", "and", "as", "at", "by", "during", "every", "for", "from", "in", "last", "near", "on",
    "or", "until", "when", "where", "which", "while", "who", "with", "together",
];

/// The place or firm that a phrase begins with. One in lower case is at most two words long.
fn place(phrase: Phrase) -> Option<String> {
    let phrase = phrase.up_to(PLACE_ENDS).up_to(EXTENTS).up_to(ENDS);
    let place = phrase.written().filter(|_| !phrase.has(NO_PLACES))?;
    let words = phrase.words.len() - usize::from(phrase.first() == "the");
    let lower = words <= 2 && place.starts_with(char::is_alphabetic);
    (lower || is_named(&place)).then_some(place)
}

/// Whether a text has a capital, or is of a script that has none.
fn is_named(text: &str) -> bool {
    text.contains(|c: char| c.is_alphabetic() && !c.is_lowercase())
}

fn employer(phrase: Phrase) -> Option<String> {
    match phrase.first() {
        article @ ("a" | "an") => Some(format!("{article} {}", place(phrase.of(&phrase.words[1..]))?)),
        _ => place(phrase),
    }
}

/// "a nurse", but not "usual" or "hard as I can".
fn occupation(phrase: Phrase) -> Option<String> {
    let phrase = phrase.up_to(PLACE_ENDS).up_to(EXTENTS).up_to(ENDS);
    let occupation = phrase.written().filter(|_| !phrase.has(&["team", "result", "rule"]))?;
    (["a", "an", "the"].contains(&phrase.first()) || is_named(&occupation)).then_some(occupation)
}

/// What nobody's liking is about that is worth keeping: it is clear in its place only, or no thing.
const NO_LIKINGS: &[&str] = &[
    "all", "answer", "answers", "anything", "are", "both", "can", "did", "do", "does", "etc", "everything",
    "he", "how", "i", "idea", "if", "is", "it", "its", "me", "more", "neither", "none", "not", "nothing",
    "on", "one", "others", "plan", "she", "so", "such", "suggestion", "that", "them", "these", "they",
    "this", "those", "too", "us", "was", "way", "we", "were", "what", "when", "who", "why", "will", "would",
    "you", "your", "yours", "stuff", "explanations", "replies", "responses", "myself", "yourself", "nobody",
];
/// What such a thing begins with.
const NO_LIKING_BEGINS: &[&str] = &["to", "her", "his", "him", "their", "very", "up", "by", "here", "there"];

/// A statement for each thing that a phrase names, which `following` may go on to list.
fn each(kind: &str, verb: &str, rest: Phrase, following: &[Phrase]) -> Vec<Statement> {
    let listed = |thing: Phrase| {
        let plain = Some(thing.plain()).filter(|_| is_liking(thing))?;
        Some(Statement { key: listed_key(kind, &plain), value: format!("{verb} {}", thing.written()?) })
    };
    things(rest, following).into_iter().filter_map(listed).collect()
}

fn is_liking(thing: Phrase) -> bool {
    !thing.has(NO_LIKINGS) && !NO_LIKING_BEGINS.contains(&thing.first())
}

/// The things of "tea", "tea and cake" or "tea, milk and honey"; "black and white films" are one.
fn things<'a>(phrase: Phrase<'a>, following: &[Phrase<'a>]) -> Vec<Phrase<'a>> {
    let phrase = phrase.up_to(EXTENTS).up_to(ENDS);
    let mut things = parts(phrase);
    if things.iter().any(|thing| thing.words.len() > 1) {
        things = vec![phrase];
    }
    if things.len() == 1 {
        things.extend(list(following));
    }
    things
}

/// The rest of a list, if that is what clauses begin with: short things, the last of them after "and".
fn list<'a>(clauses: &[Phrase<'a>]) -> Vec<Phrase<'a>> {
    let mut list = Vec::new();
    for clause in clauses {
        let things = parts(clause.up_to(EXTENTS).up_to(ENDS));
        let fits = |thing: &Phrase| {
            let led = thing.without_leads().words.len() < thing.words.len();
            thing.words.len() <= 2 && is_liking(*thing) && !led
        };
        if !things.iter().all(fits) {
            break;
        }
        list.extend(things);
        if clause.has(&["and", "or"]) {
            return list;
        }
    }
    Vec::new()
}

fn parts(phrase: Phrase) -> Vec<Phrase> {
    let parts = phrase.words.split(|word| ["and", "or"].contains(&word.plain.as_str()));
    parts.filter(|part| !part.is_empty()).map(|part| phrase.of(part)).collect()
}

/// What is said of "my …" in passing, or is better not kept.
const NO_THINGS: &[&str] = &[
    "advice", "answer", "concern", "god", "guess", "issue", "opinion", "point", "problem", "question",
    "request", "text", "turn", "understanding", "wish", "idea", "intention", "fault",
];
/// Words of things that are better not kept.
const SECRETS: &[&str] = &[
    "password", "passphrase", "passcode", "pin", "pwd", "secret", "token", "cvv", "cvc", "ssn", "key", "code",
];
/// What a value begins with that denies, asks or explains.
const NO_VALUES: &[&str] =
    &["not", "no", "never", "what", "that", "how", "why", "when", "whether", "because", "still", "like"];

/// The thing of "my <thing> is <value>".
fn thing(phrase: Phrase) -> Option<Statement> {
    let is = phrase.words.iter().position(|word| word.plain == "is")?;
    let thing = phrase.of(&phrase.words[..is]).plain();
    let value = phrase.of(&phrase.words[is + 1..]).up_to(ENDS);
    let short = (1..=MAX_WORDS.2).contains(&is) && thing.len() <= MAX_CHARS.1;
    let denied = NO_VALUES.contains(&value.first())
        || (NO_NAMES.contains(&value.first()) && !thing.starts_with("favo"));
    let secret = |word: &str| SECRETS.contains(&word);
    let kept = !NO_THINGS.contains(&thing.as_str()) && !thing.split(' ').any(secret);
    (short && !denied && kept).then_some(())?;
    Some(Statement { key: key(&thing), value: value.written()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        sentences::own_sentences,
        wishes::{Wish, wishes},
    };

    /// Sentences, and what they say as "key=value".
    const SAID: &[(&str, &[&str])] = &[
        // Names.
        ("my name is John", &["name=John"]),
        ("Hi, my name is John!", &["name=John"]),
        ("My name’s John.", &["name=John"]),
        ("MY NAME IS JOHN", &["name=JOHN"]),
        ("My name is actually Jane", &["name=Jane"]),
        ("My name is: Jane", &["name=Jane"]),
        ("My name is Dr. Smith. I like tea.", &["name=Dr. Smith", "preference:tea=likes tea"]),
        ("my name is **John**", &["name=John"]),
        ("My name is Zoe\u{308} 😀", &["name=Zoe\u{308}"]),
        ("मेरा नाम: my name is विक्रम", &[]),
        ("my name is विक्रम", &["name=विक्रम"]),
        ("my name is 李雷。", &["name=李雷"]),
        ("call me John", &["name=John"]),
        ("By the way, you can call me John.", &["name=John"]),
        ("My name is Jonathan but call me John", &["name=Jonathan", "name=John"]),
        ("I'm called John", &["name=John"]),
        ("I am John", &["name=John"]),
        ("I am John and I live in Berlin", &["name=John", "location=Berlin"]),
        ("My name is John how are you", &["name=John"]),
        ("My name is John (he/him), nice to meet you", &["name=John"]),
        ("my name is not Bob", &[]),
        ("my name isn't Bob but Rob", &[]),
        ("my name is what?", &[]),
        ("my name was Bob", &[]),
        ("is my name John?", &[]),
        ("is my name John", &[]),
        ("My name is Bob, right?", &[]),
        ("I wish my name were Bob", &[]),
        ("call me at 5", &[]),
        ("Call me tomorrow", &[]),
        ("my name is spelled with a K", &[]),
        // Places and work.
        ("I live in Berlin", &["location=Berlin"]),
        ("I live in Berlin.", &["location=Berlin"]),
        ("i live in new york", &["location=new york"]),
        ("I currently live in New York City with my wife", &["location=New York City"]),
        ("I live in the Netherlands now", &["location=the Netherlands"]),
        ("I LIVE IN BERLIN!!!", &["location=BERLIN"]),
        ("I moved to Berlin", &["location=Berlin"]),
        ("I've moved to Berlin", &["location=Berlin"]),
        ("I’ve just moved to Berlin last week", &["location=Berlin"]),
        ("I live in Berlin and work as a nurse", &["location=Berlin", "occupation=a nurse"]),
        ("I live in Berlin, Germany and work for ACME", &["location=Berlin", "employer=ACME"]),
        ("I live in Rome, not in Berlin", &["location=Rome"]),
        ("I no longer live in Berlin", &[]),
        ("I don't live in Berlin", &[]),
        ("I used to live in Berlin", &[]),
        ("I want to live in Rome", &[]),
        ("my brother lives in Rome", &[]),
        ("suppose I live in Rome", &[]),
        ("Imagine I live in Rome. I work as a spy.", &[]),
        ("In my novel, I live in Rome. My name is Bob.", &[]),
        ("Let's pretend: I live in Rome.", &[]),
        ("I live in fear", &[]),
        ("I live in constant fear of spiders", &[]),
        ("I live in a small flat", &[]),
        ("I was moved to tears", &[]),
        ("I work as a nurse", &["occupation=a nurse"]),
        ("I work as an engineer at ACME", &["occupation=an engineer"]),
        ("I work as hard as I can", &[]),
        ("I am a nurse", &[]),
        ("I am a bit tired", &[]),
        ("I am a big fan", &[]),
        ("I work at ACME", &["employer=ACME"]),
        ("I work for ACME in Berlin", &["employer=ACME"]),
        ("I work at a bank", &["employer=a bank"]),
        ("I work at night", &[]),
        ("I work for free", &[]),
        ("I work for fun", &[]),
        ("I work for eight hours a day", &[]),
        ("I come from Spain", &["origin=Spain"]),
        ("I'm from Spain", &["origin=Spain"]),
        ("I'm from the US", &["origin=the US"]),
        ("I'm originally from Spain", &["origin=Spain"]),
        ("I come from a big family", &[]),
        // Age and allergies.
        ("I am 41 years old", &["age=41"]),
        ("I'm 41", &["age=41"]),
        ("I'm 41 and I'm from Spain", &["age=41", "origin=Spain"]),
        ("I am 5 minutes late", &[]),
        ("I'm Vegan", &[]),
        ("I'm 100% sure", &[]),
        ("I'm allergic to peanuts", &["allergy:peanuts=allergic to peanuts"]),
        (
            "I’m allergic to Peanuts, eggs and cow milk!",
            &[
                "allergy:peanuts=allergic to Peanuts", "allergy:eggs=allergic to eggs",
                "allergy:cow milk=allergic to cow milk",
            ],
        ),
        ("I'm not allergic to peanuts", &[]),
        // Likings.
        ("I like pizza", &["preference:pizza=likes pizza"]),
        ("I love Green Tea.", &["preference:green tea=likes Green Tea"]),
        ("I really enjoy jazz a lot", &["preference:jazz=likes jazz"]),
        ("I prefer tea to coffee", &["preference:tea=likes tea"]),
        ("I like pizza 😀", &["preference:pizza=likes pizza"]),
        ("I like C++ more than Java", &["preference:c++=likes C++"]),
        ("I don't like java", &["preference:java=does not like java"]),
        ("I don’t really like Java.", &["preference:java=does not like Java"]),
        ("I dislike rain", &["preference:rain=does not like rain"]),
        ("I hate rain because it's wet", &["preference:rain=does not like rain"]),
        ("I can't stand noise", &["preference:noise=does not like noise"]),
        ("I like tea and coffee", &["preference:tea=likes tea", "preference:coffee=likes coffee"]),
        (
            "I like tea, coffee and ice cream",
            &[
                "preference:tea=likes tea", "preference:coffee=likes coffee",
                "preference:ice cream=likes ice cream",
            ],
        ),
        ("I like black and white films", &["preference:black and white films=likes black and white films"]),
        (
            "I like tea and hate coffee",
            &["preference:tea=likes tea", "preference:coffee=does not like coffee"],
        ),
        ("I like tea. I don't like tea!", &["preference:tea=likes tea", "preference:tea=does not like tea"]),
        ("I like tea, you know", &["preference:tea=likes tea"]),
        ("My brother likes tea and I like milk", &["preference:milk=likes milk"]),
        ("I used to like tea", &[]),
        ("do I like tea?", &[]),
        ("I like tea?", &[]),
        ("I like tea, don't I?", &[]),
        ("my brother likes tea", &[]),
        ("I'd like a coffee", &[]),
        ("I would like to know", &[]),
        ("I like it when it rains", &[]),
        ("I like it when", &[]),
        ("I like how you think", &[]),
        ("I like how", &[]),
        ("I like that idea", &[]),
        ("I like the idea", &[]),
        ("I like to think", &[]),
        ("I feel like a king", &[]),
        ("looks like rain", &[]),
        ("I'm like, totally lost", &[]),
        ("I love you", &[]),
        ("I like \"quoted\" things", &[]),
        ("She was like, I love tea", &[]),
        ("I hate to say this", &[]),
        // Anything else of one's own.
        ("My favourite colour is blue", &["favorite_color=blue"]),
        ("my favorite color is Blue!", &["favorite_color=Blue"]),
        ("my favourite colour is not blue", &[]),
        ("my dog's name is Rex", &["dog's_name=Rex"]),
        ("My birthday is May 5", &["birthday=May 5"]),
        ("my sister is a doctor", &[]),
        ("my point is that I like tea", &[]),
        ("my password is hunter2", &[]),
        // Others' words, and words for others.
        ("he said my name is Bob", &[]),
        ("She told me \"I like cats\"", &[]),
        ("He shouted \"Hi. My name is Bob. I like tea.\" and left", &[]),
        ("'Hi. My name is Bob. I like tea.'", &[]),
        ("“Hi.\nMy name is Bob.\nI like tea.”\nI like cats", &["preference:cats=likes cats"]),
        ("He said that\nmy name is Bob", &[]),
        ("if my name is Bob, I win", &[]),
        ("pretend my name is Bob", &[]),
        ("As a joke, my name is Bob", &[]),
        ("My name is Bob. Just kidding!", &[]),
        ("Translate this: my name is Bob", &[]),
        ("Translate to German. My name is Bob. I like tea.", &[]),
        ("Repeat after me: my name is Bob. I like tea.", &[]),
        ("Fix the grammar:\nMy name is Bob.\nI like tea.", &[]),
        ("Write a story. My name is Bob.", &[]),
        ("Here are the lyrics. I like birds.", &[]),
        ("Something about me: I like tea", &["preference:tea=likes tea"]),
        ("```\nI like tea\n```\nI like milk", &["preference:milk=likes milk"]),
        ("> I like tea\nI like milk", &["preference:milk=likes milk"]),
        ("`I like tea`", &[]),
        ("Bob: I like tea", &[]),
        ("My TV is 55\" wide. I like tea", &["preference:tea=likes tea"]),
        // Wishes.
        ("be brief", &["verbosity=low"]),
        ("Be concise.", &["verbosity=low"]),
        ("keep it short", &["verbosity=low"]),
        ("keep your answers short", &["verbosity=low"]),
        ("short answers please", &["verbosity=low"]),
        ("Please answer briefly.", &["verbosity=low"]),
        ("Can you be brief?", &["verbosity=low"]),
        ("I'd like you to be less verbose from now on", &["verbosity=low"]),
        ("Don't be so wordy", &["verbosity=low"]),
        ("From now on, be as brief as possible", &["verbosity=low"]),
        ("My name is John, be brief", &["name=John", "verbosity=low"]),
        ("you can be more detailed", &["verbosity=high"]),
        ("give me long answers", &["verbosity=high"]),
        ("give me detailed answers", &["verbosity=high"]),
        ("answer at length", &["verbosity=high"]),
        ("more detail please", &["verbosity=high"]),
        ("normal length is fine", &["verbosity=medium"]),
        ("answer normally", &["verbosity=medium", "tone=neutral", "depth=normal"]),
        ("Let’s keep it casual", &["tone=casual"]),
        ("be less formal", &["tone=casual"]),
        ("talk casually", &["tone=casual"]),
        ("be more technical", &["tone=technical"]),
        ("use technical terms", &["tone=technical"]),
        ("use technical language", &["tone=technical"]),
        ("be less technical", &["tone=neutral"]),
        ("Be brief and technical, please", &["verbosity=low", "tone=technical"]),
        ("explain it simply", &["depth=shallow"]),
        ("keep it simple", &["depth=shallow"]),
        ("explain like I'm five", &["depth=shallow"]),
        ("use simple words", &["depth=shallow"]),
        ("go into depth", &["depth=advanced"]),
        ("go deep", &["depth=advanced"]),
        ("explain as to an expert", &["depth=advanced"]),
        ("I want expert-level answers", &["depth=advanced"]),
        ("short circuit in my quick sort", &[]),
        ("write a brief essay", &[]),
        ("why be brief?", &[]),
        ("he said be brief", &[]),
        ("he said \"be brief\"", &[]),
        ("don't be brief", &[]),
        ("Please, no long answers", &[]),
        ("the report should be detailed", &[]),
        ("brief me on the news", &[]),
        ("a detailed map of Rome please", &[]),
        ("my boss says I should be more technical", &[]),
        ("keep it short-circuited", &[]),
        ("is it technical?", &[]),
        ("In the letter, be brief", &[]),
        ("Write an email and keep it short", &[]),
    ];

    /// Everything that a text says.
    fn said(text: &str) -> Vec<String> {
        let wish = |wish| match wish {
            Wish::Verbosity(level) => format!("verbosity={level}"),
            Wish::Tone(tone) => format!("tone={tone}"),
            Wish::Depth(depth) => format!("depth={depth}"),
        };
        let own = own_sentences(text);
        let statements =
            statements(&own).into_iter().map(|Statement { key, value }| format!("{key}={value}"));
        statements.chain(wishes(&own).into_iter().map(wish)).collect()
    }

    #[test]
    fn what_is_plainly_said_is_read_and_nothing_else() {
        let wrong = SAID.iter().filter(|(text, expected)| said(text) != *expected);
        let wrong: Vec<_> = wrong.map(|(text, expected)| (text, said(text), expected)).collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn only_so_much_is_read_of_one_text() {
        let facts: Vec<_> = (0..3000).map(|i| format!("My k{i} is bb. ")).collect();
        let found = statements(&own_sentences(&facts.concat()));
        assert_eq!((found.len(), &*found[15].key), (MAX, "k15"));
        assert_eq!(wishes(&own_sentences(&"be brief. ".repeat(100))).len(), MAX);
        for long in [format!("my name is {}", "x".repeat(300)), format!("I like {}", "very ".repeat(20))] {
            assert_eq!(statements(&own_sentences(&long)), []);
        }
    }

    #[test]
    fn lines_of_facts_are_read_back() {
        for (line, key) in [
            ("likes Green Tea", "preference:green tea"),
            ("does not like java", "preference:java"),
            ("allergic to peanuts", "allergy:peanuts"),
        ] {
            assert_eq!(read_line(line), Some(Statement { key: key.into(), value: line.into() }));
        }
        let color = Statement { key: "favorite_color".into(), value: "blue: dark".into() };
        assert_eq!(read_line("favorite color: blue: dark"), Some(color));
        assert_eq!(read_line("nothing"), None);
    }

    /// Finishes, though it would take minutes if anything were more than linear.
    #[test]
    fn long_texts_of_any_shape_are_read_in_linear_time() {
        let pieces = [
            "a", "hi ", "my ", "my name is ", "i like a and ", "i like a, ", "and i ", "\" ", " '", " 'a",
            "`", "\n", "a.\t", ". ", "?", ":", "be brief and ", "can you ", "please ", "if ", "my a is b. ",
            "İ", "\u{1F600}", "’", "<>(", "very ", "really ", "love a, ", "I'm ", "\u{301}",
        ];
        for piece in pieces {
            said(&piece.repeat(50_000 / piece.len()));
            let sentence = format!("I like {}. ", piece.repeat(1_900 / piece.len()));
            said(&sentence.repeat(20));
        }
    }
}
