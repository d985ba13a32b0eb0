"""The papers' tables as data, and a suite's results beside them.

`results/published/` holds one CSV per source and `protocols.yaml`; results/published/README.md
explains their columns. What a paper does not say is missing there, never guessed.

    read_published() -> DataFrame            every published number, one row each
    protocols() -> {key: {...}}              how they were made, by a suite's `protocol`
    check_protocol(key)                      SuiteError for a key that is not among them
    side_by_side(ours, protocol, ...)        published | ours | difference | same order?
    blocks_of(results, protocol, analyses)   the same for every base and target of a suite
    tables_of(results, protocol, analyses)   those to be shown (attrs title, notes, key)
    markdown(item), latex(item), plain(item) a block as text, or as numbers for CSV
"""

from ballast.published.agreement import Agreement, agreement
from ballast.published.comparison import SideBySide, side_by_side
from ballast.published.data import (
    COLUMNS,
    ROLES,
    check_protocol,
    check_published,
    protocols,
    read_published,
)
from ballast.published.ours import blocks_of, protocol_of, rows_of
from ballast.published.show import frame, latex, markdown, plain, tables_of

__all__ = [
    "COLUMNS", "ROLES", "Agreement", "SideBySide", "agreement", "blocks_of", "check_protocol",
    "check_published", "frame", "latex", "markdown", "plain", "protocol_of", "protocols",
    "read_published", "rows_of", "side_by_side", "tables_of",
]  # fmt: skip
