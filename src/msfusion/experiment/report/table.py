"""Tables of figures: declared as columns over plain rows, then printed, or handed on as texts.

    table = Table(
        "who takes part",
        [
            Column("who", "participant", align="left"),
            Column("in all", "bytes", size),
            Column("speed", "gigaflops", "{:.3g} GFLOP/s".format, optional=True),
        ],
        [{"participant": 0, "bytes": 1500}, {"participant": 1, "bytes": None}],
    )
    table.texts()           # ["who", "in all"], [["0", "1.5 kB"], ["1", "-"]]: nobody has a speed

`console.print(table)` prints the same. What is shown is text wherever the console takes it so (`cli.console`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import rich.table
    from rich.console import Console, ConsoleOptions

Row = Mapping[str, Any]

LONGEST_WHOLE = 16
"""Characters. A longer cell or word on one line would leave the other columns of a narrow terminal no room."""


@dataclass(frozen=True)
class Column:
    """A heading, and what each row says under it.

    `figure` is a key of the rows, or a function that finds the figure in a row. `told` makes it a text; where a row
    has no such figure, or None, `missing` stands. An `optional` column is left out where no row has a figure. The cells
    of a column that is to be `whole` stay on one line, unless one is longer than `LONGEST_WHOLE`.
    """

    heading: str
    figure: str | Callable[[Row], Any]
    told: Callable[[Any], str] = str
    align: Literal["left", "right"] = "right"
    missing: str = "-"
    optional: bool = False
    whole: bool = False

    def figure_of(self, row: Row) -> Any:
        """The figure that a row has in this column; None where it has none."""
        return row.get(self.figure) if isinstance(self.figure, str) else self.figure(row)

    def text_of(self, row: Row) -> str:
        """The cell of a row."""
        figure = self.figure_of(row)
        return self.missing if figure is None else self.told(figure)


@dataclass(frozen=True)
class Table:
    """A title, columns, and rows of figures. `below` are rows apart from the others, such as the full model's beneath
    those of the participants; `notes` are sentences under the table.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    below: Sequence[Row] = ()
    notes: Sequence[str] = ()

    @property
    def shown(self) -> list[Column]:
        """The columns without those that are optional and have nothing to say."""
        rows = [*self.rows, *self.below]
        return [
            column
            for column in self.columns
            if not column.optional or any(column.figure_of(row) is not None for row in rows)
        ]

    def texts(self) -> tuple[list[str], list[list[str]]]:
        """The headings, and the cells of each row, those of `below` last."""
        columns = self.shown
        cells = [[column.text_of(row) for column in columns] for row in (*self.rows, *self.below)]
        return [column.heading for column in columns], cells

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[rich.table.Table | Table]:
        """What a console of rich prints. Nothing is cut off: where the words of all columns cannot stand side by side,
        half of the figures stand below, beside the names once more; a column that is still too narrow folds its words.
        """
        names = list(takewhile(lambda column: column.align == "left", self.shown))
        figures = self.shown[len(names) :]
        if len(figures) < 2 or self._narrowest() <= options.max_width:
            yield self._printed()
            return
        half = (len(figures) + 1) // 2
        yield replace(self, columns=[*names, *figures[:half]], notes=())
        yield replace(self, columns=[*names, *figures[half:]], title=f"{self.title} (continued)")

    def _narrowest(self) -> int:
        """The width at which no number and no short name is broken, two characters between columns."""
        headings, rows = self.texts()
        words = [" ".join(texts).split() for texts in zip(headings, *rows, strict=True)]
        return sum(min(LONGEST_WHOLE, max(map(len, own), default=0)) + 2 for own in words)

    def _printed(self) -> rich.table.Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as Printed

        printed = Printed(
            title=self.title,
            caption="\n".join(self.notes) or None,
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,  # eight columns fit into 80 characters
        )
        rows = self.texts()[1]
        for number, column in enumerate(self.shown):
            whole = column.whole and all(len(cells[number]) <= LONGEST_WHOLE for cells in rows)
            overflow: Literal["ellipsis", "fold"] = "ellipsis" if whole else "fold"
            printed.add_column(column.heading, justify=column.align, overflow=overflow, no_wrap=whole)
        for number, cells in enumerate(rows, start=1):
            printed.add_row(*cells, end_section=number == len(self.rows))
        return printed
