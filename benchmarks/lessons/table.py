"""Reproduce a row of a paper's table, and read the verdict. The rows are committed; no data are needed to read them.

What to see: a printed number is reached, not reached, or cannot be told: an accuracy is a mean over 10,000 images, so a
shortfall of less than two standard errors says nothing. Counts (sizes, ratios, bit operations) have no such excuse. The
command at the end makes the row anew, from the data to the file to the verdict, in minutes.
"""

from ..docs.words import metric
from ..report.verdicts import verdicts
from ..rows import RESULTS, read_rows

TABLE, ROW = "deep_compression_table2", "matched"


def main() -> None:
    row = next(row for row in read_rows(RESULTS / "rows" / TABLE, print) if row["name"] == ROW)
    print(f"{TABLE}, {ROW}: {row['network']} on {row['task']}, {row['bytes']:,} B")
    for one in verdicts(row):
        name, show = metric(one.metric)
        ours = "—" if one.ours is None else show(one.ours)
        print(f"  {name:<34} printed {show(one.printed):>8}   ours {ours:>8}   {one.verdict}")
    print(f"again: python -m benchmarks reproduce paper_configs/{TABLE}.toml --row {ROW}")
    assert verdicts(row)


if __name__ == "__main__":
    main()
