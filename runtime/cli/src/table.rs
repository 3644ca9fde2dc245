//! Tables for people.

/// Rows of cells, the titles first, each column as wide as it must be. The last one is not filled up.
pub(crate) fn render<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line.push_str(&format!("{cell:width$}   "));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_stand_below_each_other() {
        let rows = [["A", "LONG", "C"], ["aaaa", "b", ""], ["ä", "b", "c"]].map(|row| row.map(str::to_owned));
        assert_eq!(super::render(&rows), "A      LONG   C\naaaa   b\nä      b      c\n");
    }
}
