//! Pages of a listing: how many, which way, and where the last one ended.

use std::fmt::Write as _;

use super::ids::{digest, parse_hex};

/// Which way a listing runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    Asc,
    Desc,
}

impl Direction {
    /// The comparison that leads on from a row, and the order, in SQL's words.
    pub fn sql(self) -> (&'static str, &'static str) {
        match self {
            Self::Asc => (" > ", " ASC"),
            Self::Desc => (" < ", " DESC"),
        }
    }
}

/// A question that is answered in pages, reduced to 64 bits: what is listed, for whom, in which order, with
/// which filters. A cursor carries it, so that one listing's cursor is refused by another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listing(i64);

impl Listing {
    /// Parts are told apart from each other, so that `["a", "b"]` is another listing than `["ab"]`.
    pub fn of(parts: &[&str]) -> Self {
        Self(digest(parts))
    }
}

/// Where a page ended: the keys of its last row. Opaque text at the edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// What the listing is ordered by, as a number.
    pub key: i64,
    /// What tells rows with equal keys apart.
    pub id: i64,
}

impl Position {
    /// The cursor that leads on from here.
    pub fn cursor(self, listing: Listing) -> String {
        let mut text = String::with_capacity(48);
        for bits in [listing.0, self.key, self.id] {
            // Writing to a string cannot fail.
            let _ = write!(text, "{bits:016x}");
        }
        text
    }

    /// Reads a cursor; `None` if it was not issued for this listing.
    pub fn parse(cursor: &str, listing: Listing) -> Option<Self> {
        let part = |i: usize| cursor.get(i * 16..(i + 1) * 16).and_then(parse_hex);
        if cursor.len() != 48 || part(0)? != listing.0 {
            return None;
        }
        Some(Self { key: part(1)?, id: part(2)? })
    }
}

/// One page, and where the next begins.
#[derive(Clone, Debug)]
pub struct Page<T> {
    pub items: Vec<T>,
    pub next: Option<Position>,
}

impl<T> Page<T> {
    /// Cuts the row too many off `rows`, which were asked for as `limit + 1`.
    pub fn cut(mut rows: Vec<T>, limit: usize, position: impl Fn(&T) -> Position) -> Self {
        let more = rows.len() > limit;
        rows.truncate(limit);
        let next = rows.last().filter(|_| more).map(position);
        Self { items: rows, next }
    }

    /// The same page of other things.
    pub fn map<U>(self, convert: impl FnMut(T) -> U) -> Page<U> {
        Page { items: self.items.into_iter().map(convert).collect(), next: self.next }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_reads_back_for_its_own_listing_only() {
        let (mine, other) = (Listing::of(&["turns", "a"]), Listing::of(&["turnsa"]));
        let position = Position { key: -5, id: i64::MAX };
        let cursor = position.cursor(mine);
        assert_eq!(Position::parse(&cursor, mine), Some(position));
        assert_eq!(Position::parse(&cursor, other), None);
    }

    #[test]
    fn other_text_is_no_cursor() {
        let listing = Listing::of(&["x"]);
        for text in ["", "abc", &"0".repeat(48), &"é".repeat(24), &"g".repeat(48)] {
            assert_eq!(Position::parse(text, listing), None, "{text}");
        }
    }
}
