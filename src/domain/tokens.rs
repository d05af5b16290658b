//! How many tokens a text is, by estimate.

/// What the frame of one message costs beside its text.
pub const MESSAGE_OVERHEAD: i64 = 4;

/// Tokens of `text`: four ASCII characters, or one other character, to a token, rounded up.
///
/// An estimate that needs no vocabulary (a real one takes 45 MB of memory) and errs on the high side for
/// scripts that tokenizers cut finely, so that a budget stays a bound.
pub fn count(text: &str) -> i64 {
    // Most texts are all ASCII, which is told many bytes at a time.
    let (ascii, other) = match text.is_ascii() {
        true => (text.len(), 0),
        false => (text.bytes().filter(u8::is_ascii).count(), text.chars().filter(|c| !c.is_ascii()).count()),
    };
    i64::try_from(ascii.div_ceil(4) + other).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ascii_counts_a_quarter_and_other_characters_one() {
        assert_eq!(count(""), 0);
        assert_eq!(count("abcd"), 1);
        assert_eq!(count("abcde"), 2);
        assert_eq!(count("日本語"), 3);
        assert_eq!(count("日本 abc"), 3);
    }
}
