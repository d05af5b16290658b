//! The wishes of a text for how its speaker is answered: "be brief", "use technical terms", "go into depth".
//!
//! Rules for English. A clause is a wish if it is one from its first word to its last: "write a brief essay" is
//! none.

use super::{
    sentences::{Sentence, after, is_frame, without_courtesy},
    statements::MAX,
};

/// A lasting wish for how to be answered, in the words of a behavior profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// `low`, `medium` or `high`.
    Verbosity(&'static str),
    /// `casual`, `neutral` or `technical`.
    Tone(&'static str),
    /// `shallow`, `normal` or `advanced`.
    Depth(&'static str),
}

/// The wishes of sentences that are their speaker's own, in order; at most [`MAX`].
pub fn wishes(own: &[Sentence]) -> Vec<Wish> {
    own.iter().flat_map(wished).take(MAX).collect()
}

/// What may stand after a wish.
const WISH_ENDS: &[&str] = &[
    "please", "thanks", "thank you", "from now on", "in future", "in the future", "always", "with me",
    "for me", "ok", "okay", "then", "next time", "in your answers", "in your replies", "in your responses",
    "as possible", "is fine", "are fine", "is enough", "are enough", "now", "again", "at all times",
];
/// How a wish for the manner of answers begins.
const MANNERS: &[&str] = &[
    "be", "stay", "sound", "go", "talk to me", "talk", "speak to me", "speak", "write", "answer me",
    "answer", "reply", "respond", "explain it to me", "explain this to me", "explain things to me",
    "explain to me", "explain it", "explain this", "explain things", "explain everything", "explain",
    "put it", "keep it", "keep things", "keep everything",
];
/// The same with the name of what shall be so: "keep your answers short".
const MANNERS_OF: &[&str] = &["keep your", "keep all your", "keep the", "keep", "make your", "make the"];
/// What may stand before what is wished.
const GIVERS: &[&str] = &["give me", "provide", "use", "write", "in", "into", "with", "a", "an"];
const DEGREES: &[&str] = &[
    "a bit", "a little", "a lot", "much", "very", "really", "as", "quite", "rather", "super", "extra", "even",
];
/// What is given as an answer, and what an answer is said in.
const ANSWERS: &[&str] = &["answers", "replies", "responses", "explanations", "length", "depth"];
const LANGUAGE: &[&str] = &["language", "terms", "words", "vocabulary", "tone", "style", "english"];
/// The way back, for all that may be wished.
const USUAL: [Wish; 3] = [Wish::Verbosity("medium"), Wish::Tone("neutral"), Wish::Depth("normal")];
/// What answers may be wished to be.
const QUALITIES: &[(Wish, &[&str])] = &[
    (
        Wish::Verbosity("low"),
        &[
            "brief", "briefly", "briefer", "short", "shorter", "concise", "concisely", "terse", "tersely",
            "succinct", "succinctly", "to the point",
        ],
    ),
    (
        Wish::Verbosity("high"),
        &[
            "long", "longer", "lengthy", "detailed", "detail", "verbose", "wordy", "elaborate", "thorough",
            "thoroughly", "extensive", "extensively", "comprehensive", "at length",
        ],
    ),
    (Wish::Tone("casual"), &["casual", "casually", "informal", "informally", "relaxed"]),
    (Wish::Tone("neutral"), &["formal", "formally", "neutral", "neutrally"]),
    (Wish::Tone("technical"), &["technical", "technically"]),
    (
        Wish::Depth("shallow"),
        &[
            "simple", "simply", "simpler", "basic", "plain", "layman's", "like i am five", "like i am 5",
            "like i am a child", "like i am a beginner", "to a child", "to a beginner",
        ],
    ),
    (
        Wish::Depth("advanced"),
        &[
            "depth", "in-depth", "deep", "deeper", "deeply", "expert-level", "expert level", "expert",
            "advanced", "to an expert", "for an expert", "like i am an expert", "like to an expert",
        ],
    ),
];

fn wished(sentence: &Sentence) -> Vec<Wish> {
    let mut found = Vec::new();
    for clause in sentence.clauses() {
        let words = clause.plain();
        let (requests, wish) = without_courtesy(&words);
        // "No long answers."
        let denied = words.split(' ').any(|word| word == "no");
        let given = if denied { Vec::new() } else { clause_wishes(wish) };
        if (clause.asked && !requests) || (given.is_empty() && is_frame(wish)) {
            break;
        }
        found.extend(given);
    }
    found
}

/// The wishes that a clause begins with: of "be brief and technical" there are two.
fn clause_wishes(words: &str) -> Vec<Wish> {
    let mut found = Vec::new();
    let mut of_manner = false;
    for part in words.split(" and ").flat_map(|part| part.split(" but ")) {
        let (_, part) = without_courtesy(part);
        let part = without_ends(part);
        let denied = after(part, "do not");
        let part = denied.unwrap_or(part);
        let manner = manner(part);
        of_manner |= manner.is_some();
        let given = wish(manner.unwrap_or(part), of_manner, denied.is_some());
        if given.is_empty() {
            break;
        }
        found.extend(given);
    }
    found
}

fn without_ends(words: &str) -> &str {
    let end = |words| WISH_ENDS.iter().find_map(|end| str::strip_suffix(words, end)?.strip_suffix(' '));
    std::iter::successors(Some(words), |words| end(words)).last().unwrap_or(words)
}

/// What follows the beginning of a wish for the manner of answers.
fn manner(words: &str) -> Option<&str> {
    let of = |beginning: &&str| {
        let named = after(words, beginning)?;
        strip(named, ANSWERS).or_else(|| strip(named, LANGUAGE))
    };
    MANNERS_OF.iter().find_map(of).or_else(|| strip(words, MANNERS))
}

/// What words wish, all of them: a quality, of a manner to answer or with the name of what has it.
fn wish(words: &str, of_manner: bool, denied: bool) -> Vec<Wish> {
    let (rest, degree) = without_degrees(words);
    let less = degree == Some(Degree::Less) || (denied && degree == Some(Degree::Such));
    if denied && !less {
        // "Don't be brief" leaves open what to be; "don't be so brief" does not.
        return Vec::new();
    }
    if let Some(of) = strip(rest, &["normal", "normally", "usual"]).filter(|_| !less) {
        return usual(of, of_manner).to_vec();
    }
    let quality = |(wish, names): &(Wish, &[&str])| Some((*wish, strip(rest, names)?));
    let Some((wish, of)) = QUALITIES.iter().find_map(quality) else {
        return Vec::new();
    };
    let fits = match of {
        // "More detail" is said without a manner.
        "" => {
            of_manner
                || (degree.is_some_and(|degree| degree != Degree::Such)
                    && ["detail", "depth"].contains(&rest))
        }
        of if LANGUAGE.contains(&of) => !matches!(wish, Wish::Verbosity(_)),
        of => ANSWERS.contains(&of),
    };
    if fits { vec![if less { toned_down(wish) } else { wish }] } else { Vec::new() }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Degree {
    More,
    Less,
    /// "So brief", "too brief".
    Such,
}

/// Words without those that may stand before what is wished, and the degree that these give.
fn without_degrees(words: &str) -> (&str, Option<Degree>) {
    let (mut rest, mut degree) = (words, None);
    loop {
        let given = if let Some(after) = strip(rest, &["less", "not so", "not too"]) {
            (after, Some(Degree::Less))
        } else if let Some(after) = strip(rest, &["more"]) {
            (after, Some(Degree::More))
        } else if let Some(after) = strip(rest, &["so", "too"]) {
            (after, Some(Degree::Such))
        } else if let Some(after) = strip(rest, DEGREES).or_else(|| strip(rest, GIVERS)) {
            (after, degree)
        } else {
            return (rest, degree);
        };
        (rest, degree) = given;
    }
}

/// What follows one of these beginnings.
fn strip<'a>(words: &'a str, beginnings: &[&str]) -> Option<&'a str> {
    beginnings.iter().find_map(|beginning| after(words, beginning))
}

/// What is usual of this.
fn usual(of: &str, of_manner: bool) -> &'static [Wish] {
    match of {
        "" if of_manner => &USUAL,
        "length" => &USUAL[..1],
        "depth" => &USUAL[2..],
        of if LANGUAGE.contains(&of) => &USUAL[1..2],
        of if ANSWERS.contains(&of) => &USUAL,
        _ => &[],
    }
}

/// What is wished with less of something.
fn toned_down(wish: Wish) -> Wish {
    match wish {
        Wish::Verbosity("high") => Wish::Verbosity("low"),
        Wish::Verbosity(_) => Wish::Verbosity("medium"),
        Wish::Tone("neutral") => Wish::Tone("casual"),
        Wish::Tone(_) => Wish::Tone("neutral"),
        Wish::Depth(_) => Wish::Depth("normal"),
    }
}
