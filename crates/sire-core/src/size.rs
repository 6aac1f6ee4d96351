//! Sizes as people write them: the one place that reads them, for variables of the environment and for the command line.

/// Bytes of a text: a number, which may have a fraction, then nothing or a unit, in any case. `k`, `KiB`, ... are powers of 1024, `KB`, ... powers of
/// 1000. `None` for anything else, or for more than 64 bits.
#[must_use]
pub fn parse(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = (&text[..end], text[end..].trim().to_ascii_lowercase());
    let unit: u64 = match unit.as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return None,
    };
    match number.contains('.') {
        false => number.parse::<u64>().ok()?.checked_mul(unit),
        true => number.parse::<f64>().ok().map(|number| number * unit as f64).filter(|b| *b < 9e18).map(|b| b as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(
            ["6GiB", "1.5g", "10MB", "12", "64 k", "0"].map(parse),
            [6 << 30, 3 << 29, 10_000_000, 12, 65536, 0].map(Some)
        );
        assert_eq!(["-1", "x", "3XB", "", "inf", "1.2.3", ".", "99999999999T", "9e9"].map(parse), [None; 9]);
    }
}
