//! Pages of a listing: how many, which way, and where the last one ended.

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
    /// The cursor that leads on from here: the position, and a digest of it and the listing.
    pub fn cursor(self, listing: Listing) -> String {
        let position = format!("{:016x}{:016x}", self.key, self.id);
        format!("{position}{:016x}", digest(&[&listing.0.to_string(), &position]))
    }

    /// Reads a cursor; `None` if it was not issued for this listing, or was changed since.
    pub fn parse(cursor: &str, listing: Listing) -> Option<Self> {
        let part = |i: usize| cursor.get(i * 16..(i + 1) * 16).and_then(parse_hex);
        let position = Self { key: part(0)?, id: part(1)? };
        (position.cursor(listing) == cursor).then_some(position)
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
    use proptest::prelude::*;

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

    proptest! {
        #[test]
        fn any_text_is_read_as_no_cursor(text in "\\PC*|[0-9a-f]{48}", listing: i64) {
            prop_assert_eq!(Position::parse(&text, Listing(listing)), None);
        }

        #[test]
        fn a_changed_cursor_is_refused(key: i64, id: i64, listing: i64, at in 0_usize..48, c in "[0-9a-f]") {
            let (position, listing) = (Position { key, id }, Listing(listing));
            let cursor = position.cursor(listing);
            prop_assert_eq!(Position::parse(&cursor, listing), Some(position));
            let mut changed = cursor.clone();
            changed.replace_range(at..=at, &c);
            prop_assert!(changed == cursor || Position::parse(&changed, listing).is_none());
            prop_assert_eq!(Position::parse(&cursor.to_uppercase(), listing).is_some(), cursor == cursor.to_uppercase());
        }
    }
}
