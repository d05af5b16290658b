//! The sentences of an English text in plain words, without what is quoted in it, and which of them are its
//! speaker's own: not reported, supposed, or material to work on.
//!
//! Every step is linear in the text: it may be long, and of any shape.

/// A sentence: what its writer says in words of their own.
pub struct Sentence {
    /// In lower case, without punctuation, contractions written out.
    pub words: String,
    pub(super) end: End,
    pub(super) text: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Stop,
    Question,
    /// The end of the line: the sentence may go on in the next.
    Line,
}

/// A part of a sentence that may say something: of "my name is John, and I live in Berlin" there are two.
pub(super) struct Clause {
    pub words: Vec<Word>,
    /// Whether it asks: in a question, what stands after the last comma or like mark.
    pub asked: bool,
}

/// A plain word, and where it is written.
pub(super) struct Word {
    pub plain: String,
    pub from: usize,
    pub to: usize,
    /// Whether a comma or a like mark stands before it.
    marked: bool,
}

/// The sentences of a text, without code, quotations and quoted lines.
pub fn sentences(text: &str) -> Vec<Sentence> {
    let mut sentences = Vec::new();
    let (mut in_code, mut quote) = (false, None);
    for line in text.lines() {
        let start = line.trim_start();
        if start.starts_with("```") || start.starts_with("~~~") {
            in_code = !in_code;
        } else if !in_code && !start.starts_with('>') {
            // A quotation may go over lines, but not over paragraphs.
            quote = quote.filter(|end| *end != '\'' && !start.is_empty());
            split_line(&without_quotations(line, &mut quote), &mut sentences);
        }
    }
    sentences
}

/// A text in lower case, without punctuation, its contractions written out.
pub fn plain(text: &str) -> String {
    join(&words(text))
}

/// Words that may stand before a statement, a wish or a question without changing it.
const LEADS: &[&str] = &[
    "hi", "hello", "hey", "greetings", "atlus", "there", "well", "so", "ok", "okay", "oh", "actually",
    "sorry", "please", "and", "but", "no", "yes", "yeah", "by", "btw", "now", "also", "remember", "thanks",
    "again", "fyi", "ps", "note", "just", "anyway", "hm",
];
/// The same of several words.
const LEAD_PHRASES: &[&str] = &[
    "by the way", "to be honest", "for the record", "just so you know", "from now on", "in fact",
    "remember that", "note that", "nice to meet you",
];

/// Plain words without those at their beginning that change nothing.
pub fn without_leads(words: &str) -> &str {
    let mut rest = words;
    loop {
        let first = rest.split(' ').next().unwrap_or_default();
        let phrase = LEAD_PHRASES.iter().find_map(|lead| after(rest, lead));
        match phrase.or_else(|| after(rest, first).filter(|_| LEADS.contains(&first))) {
            Some(after) => rest = after,
            None => return rest,
        }
    }
}

/// The plain words after a beginning of whole words.
pub fn after<'a>(words: &'a str, beginning: &str) -> Option<&'a str> {
    let rest = words.strip_prefix(beginning)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_prefix(' ') }
}

/// What begins a clause of its own after "and" or "but". A verb among them has the "I" of the clause before it.
const BEGINS_CLAUSE: &[&str] = &[
    "i", "my", "call", "am", "come", "dislike", "do", "enjoy", "hate", "like", "live", "love", "prefer",
    "work",
];

impl Sentence {
    pub(super) fn clauses(&self) -> Vec<Clause> {
        let mut clauses: Vec<Clause> = Vec::new();
        for word in words(&self.text) {
            let Some(clause) = clauses.last_mut() else {
                clauses.push(Clause { words: vec![word], asked: false });
                continue;
            };
            let joins = |last: &Word| ["and", "but"].contains(&last.plain.as_str());
            let joined =
                BEGINS_CLAUSE.contains(&word.plain.as_str()) && clause.words.last().is_some_and(joins);
            if joined {
                clause.words.pop();
            }
            match joined || word.marked {
                true => clauses.push(Clause { words: vec![word], asked: false }),
                false => clause.words.push(word),
            }
        }
        if self.end == End::Question {
            let marked = |clause: &Clause| clause.words.first().is_some_and(|word| word.marked);
            let asked = clauses.iter().rposition(marked).unwrap_or(0);
            clauses[asked..].iter_mut().for_each(|clause| clause.asked = true);
        }
        clauses
    }
}

impl Clause {
    pub fn plain(&self) -> String {
        join(&self.words)
    }
}

/// Words as one text.
pub(super) fn join(words: &[Word]) -> String {
    words.iter().map(|word| word.plain.as_str()).collect::<Vec<_>>().join(" ")
}

/// Somebody else's words, or a supposition.
const REPORTED: &[&str] = &[
    " said", " says", " say ", " told", " asked", " thinks", " you think ", " they think ", " people think ",
    " claim", " believe", " wrote ", " writes", " if ", " whether ", " assum", " suppos", " imagin",
    " pretend", " lyric", " dream",
];
/// Takes back, or asks to work on, what stands before it.
const TAKEN_BACK: &[&str] = &[
    " kidding ", " joking ", " as a joke ", " translate this ", " translate that ", " translate it ",
    " the above ", " jk ",
];

/// Characters that a sentence may be long that says something; nobody states a fact in a longer one.
const MAX_CHARS: usize = 2000;

/// The sentences of a text that are its speaker's own words.
pub fn own_sentences(text: &str) -> Vec<Sentence> {
    let mut own = Vec::new();
    let (mut reported, mut end) = (false, End::Stop);
    for sentence in sentences(text).into_iter().filter(|sentence| sentence.words.len() <= MAX_CHARS) {
        let words = format!(" {} ", sentence.words);
        let has = |phrases: &[&str]| phrases.iter().any(|phrase| words.contains(phrase));
        if has(TAKEN_BACK) {
            return Vec::new();
        }
        // A sentence that is reported may go on in the next line.
        reported = has(REPORTED) || (reported && end == End::Line);
        end = sentence.end;
        if announces(&sentence, reported, has) {
            break;
        }
        if !reported {
            own.push(sentence);
        }
    }
    own
}

/// Announces words that are not the speaker's own.
const ANNOUNCES: &[&str] = &[
    " translat", " repeat ", " rewrite ", " rephrase ", " paraphras", " proofread ", " pretend", " imagin",
    " suppos", " assum", " lyric", " role play", " role-play", " act as ",
];
/// How a sentence on a text begins, and what makes it an invented one: "Write a story.", "In this story, …"
const COMPOSES: &[&str] =
    &["write ", "continue ", "complete ", "compose ", "sing ", "recite ", "create ", "play ", "in "];
const INVENTED: &[&str] = &[
    " story ", " poem ", " song ", " character ", " fiction", " scene ", " novel ", " monologue ",
    " dialogue ", " script ", " role ",
];

/// Whether other words than the speaker's follow: "Fix this: …", "Write a story."
fn announces(sentence: &Sentence, reported: bool, has: impl Fn(&[&str]) -> bool) -> bool {
    if let Some(head) = before_colon(&sentence.text) {
        return reported || !is_own(without_leads(&plain(head)));
    }
    let (_, request) = without_courtesy(&sentence.words);
    let own = request.starts_with("i ") || request.starts_with("my ");
    let composes = COMPOSES.iter().any(|request_for| request.starts_with(request_for));
    !own && (has(ANNOUNCES) || (composes && has(INVENTED)))
}

/// What stands before a colon that is no part of a word or a face.
fn before_colon(text: &str) -> Option<&str> {
    let mut colons = text.match_indices(':').map(|(at, _)| (&text[..at], &text[at + 1..]));
    let introduces = |(head, rest): &(&str, &str)| {
        head.ends_with(char::is_alphanumeric)
            && rest.chars().next().is_none_or(|next| next == '"' || next.is_whitespace())
    };
    colons.find(introduces).map(|(head, _)| head)
}

/// Whether what follows a colon after these words is the speaker's own: "Remember: …", "Something about me: …"
fn is_own(head: &str) -> bool {
    head.is_empty()
        || head.starts_with("i ")
        || (head.starts_with("my ") && head.ends_with(" is"))
        || head.contains("about me")
        || head.contains("about myself")
}

/// What a clause begins with that narrows those after it: "In the film, my name is Bob."
const FRAMES: &[&str] = &[
    "according", "after", "as", "at", "before", "during", "for", "in", "like", "maybe", "on", "once", "one",
    "perhaps", "since", "someday", "sometimes", "to", "under", "unless", "until", "when", "where", "while",
    "with",
];

/// Whether a clause that gives nothing itself keeps those after it from giving anything.
pub(super) fn is_frame(words: &str) -> bool {
    words.split(' ').next().is_some_and(|first| FRAMES.contains(&first))
        || words.split(' ').any(|word| ["that", "whether"].contains(&word))
        || words.ends_with(" like")
}

/// What makes a request of what stands after it, or a lasting one.
const COURTESIES: &[&str] = &[
    "please", "kindly", "can you", "could you", "would you", "will you", "you can", "you could", "you may",
    "you should", "i want you to", "i would like you to", "i need you to", "i would prefer you to", "i want",
    "i would like", "i would prefer", "i prefer", "i need", "let us", "from now on", "in future",
    "in the future", "try to", "always", "next time", "make sure to",
];

/// Plain words without the courtesies that they begin with; whether these ask for something to be done.
pub(super) fn without_courtesy(words: &str) -> (bool, &str) {
    let (mut requests, mut rest) = (false, without_leads(words));
    while let Some((courtesy, after)) = COURTESIES.iter().find_map(|c| Some((c, after(rest, c)?))) {
        requests |= ["can you", "could you", "would you", "will you"].contains(courtesy);
        rest = without_leads(after);
    }
    (requests, rest)
}

/// A line with a mark in place of each quotation, which is a word of its own. `quote` is how one ends that is
/// open, before and after.
fn without_quotations(line: &str, quote: &mut Option<char>) -> String {
    let mut kept = String::with_capacity(line.len());
    let mut before = ' ';
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        let next = chars.peek().copied().unwrap_or(' ');
        if let Some(end) = *quote {
            let apostrophe = ['\'', '’'].contains(&c) && next.is_alphanumeric();
            if c == end && !apostrophe {
                *quote = None;
            }
        } else {
            *quote = quotation_end(before, c, next);
            kept.push(if quote.is_some() { '"' } else { c });
        }
        before = c;
    }
    kept
}

/// How the quotation ends that a character begins; between letters it begins none, nor after a figure (5").
fn quotation_end(before: char, c: char, next: char) -> Option<char> {
    let end = match c {
        '"' | '`' => c,
        '\'' if next.is_alphabetic() || ['"', '“'].contains(&next) => c,
        '“' => '”',
        '„' => '“',
        '«' => '»',
        '‘' => '’',
        _ => return None,
    };
    (!before.is_alphanumeric()).then_some(end)
}

fn split_line(line: &str, sentences: &mut Vec<Sentence>) {
    let mut start = 0;
    let ends = line.char_indices().filter_map(|(at, c)| {
        let end = match c {
            '?' | '？' => End::Question,
            '!' | '！' | '。' => End::Stop,
            '.' if ends_sentence(&line[..at], &line[at + 1..]) => End::Stop,
            _ => return None,
        };
        Some((at + c.len_utf8(), end))
    });
    for (at, end) in ends.chain([(line.len(), End::Line)]) {
        let text = line[start..at].trim();
        start = at;
        let words = plain(text);
        if !words.is_empty() {
            sentences.push(Sentence { words, end, text: text.to_owned() });
        }
    }
}

/// Whether a point ends a sentence: not within a word, nor after an initial or a title.
fn ends_sentence(before: &str, after: &str) -> bool {
    let whole = after.chars().next().is_none_or(char::is_whitespace);
    let abbreviated =
        |word: &str| ["Dr", "Mr", "Mrs", "Ms", "Prof", "St"].contains(&word) || word.chars().nth(1).is_none();
    whole && before.rsplit(char::is_whitespace).next().is_none_or(|word| !abbreviated(word))
}

fn words(text: &str) -> Vec<Word> {
    let mut words: Vec<Word> = Vec::new();
    let (mut from, mut marked, mut before) = (None, false, ' ');
    let mut chars = text.char_indices().chain([(text.len(), ' ')]).peekable();
    while let Some((at, c)) = chars.next() {
        let next = chars.peek().map_or(' ', |(_, next)| *next);
        if is_in_word(before, c, next) {
            from = from.or(Some(at));
        } else {
            if let Some(from) = from.take() {
                push(&mut words, text, (from, at), std::mem::take(&mut marked));
            }
            if c == '"' {
                push(&mut words, text, (at, at + 1), std::mem::take(&mut marked));
            }
            // "My name is: John" is one clause.
            let opens = c == ':' && words.last().is_some_and(|word| word.plain != "is");
            marked |= opens || ",;()–—-".contains(c);
        }
        before = c;
    }
    words
}

const CONTRACTIONS: &[(&str, &str)] = &[
    ("what's", "what is"),
    ("whats", "what is"),
    ("who's", "who is"),
    ("when's", "when is"),
    ("where's", "where is"),
    ("it's", "it is"),
    ("i'm", "i am"),
    ("im", "i am"),
    ("i've", "i have"),
    ("ive", "i have"),
    ("i'd", "i would"),
    ("don't", "do not"),
    ("dont", "do not"),
    ("isn't", "is not"),
    ("isnt", "is not"),
    ("can't", "cannot"),
    ("cant", "cannot"),
    ("let's", "let us"),
];

/// Adds the plain words for one that is written.
fn push(words: &mut Vec<Word>, text: &str, (from, to): (usize, usize), marked: bool) {
    let lower = text[from..to].to_lowercase().replace(['’', '‘'], "'");
    let word = lower.trim_matches('\'');
    let written_out = CONTRACTIONS.iter().find(|(short, _)| *short == word).map_or(word, |(_, long)| long);
    for (i, plain) in written_out.split(' ').filter(|plain| !plain.is_empty()).enumerate() {
        words.push(Word { plain: plain.to_owned(), from, to, marked: marked && i == 0 });
    }
}

/// Whether a character belongs to a word, between these two.
fn is_in_word(before: char, c: char, next: char) -> bool {
    match c {
        ',' => before.is_numeric() && next.is_numeric(),
        '.' | ':' | '-' | '_' | '*' => before.is_alphanumeric() && next.is_alphanumeric(),
        // Joins letters of some scripts, and emoji.
        '\u{200D}' => next.is_alphabetic(),
        // Emoji and the like.
        '\u{2190}'..='\u{2BFF}' | '\u{FE0F}' | '\u{1F000}'..='\u{1FAFF}' => false,
        _ => !c.is_whitespace() && !";!?()\"“”»…–—。！？，、".contains(c),
    }
}
