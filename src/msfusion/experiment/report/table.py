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

from msfusion.quoting import plain

if TYPE_CHECKING:
    import rich.table
    from rich.console import Console, ConsoleOptions

Row = Mapping[str, Any]

LONGEST_WHOLE = 16
"""Characters. A longer cell or word on one line would leave the other columns of a narrow terminal no room."""

CONTINUED = " (continued)"


def _width(text: str) -> int:
    """How many characters of a terminal a text takes, of several lines the longest."""
    from rich.cells import cell_len

    return max((cell_len(plain(line)) for line in text.splitlines()), default=0)


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
        room = options.max_width - 2 * len(self.shown)  # two characters between columns
        widths = self._widths(room)
        if len(figures) < 2 or sum(widths) <= room:
            yield self._printed(widths if sum(widths) <= room else [None] * len(widths))
            return
        half = (len(figures) + 1) // 2
        title = f"{self.title.removesuffix(CONTINUED)}{CONTINUED}"
        yield replace(self, columns=[*names, *figures[:half]], notes=())
        yield replace(self, columns=[*names, *figures[half:]], title=title)

    def _widths(self, room: int) -> list[int]:
        """How wide each column is to be: as its texts, if there is room, and else folded between words.

        rich by itself would make the widest columns narrow first, whether they can be folded or not. The sum is more
        than the room where a heading, a number or a short name would have to be broken.
        """
        headings, rows = self.texts()
        least, widths = [], []
        for column, heading, *cells in zip(self.shown, headings, *rows, strict=True):
            longest = max(map(_width, cells), default=0)
            words = max((_width(word) for cell in cells for word in cell.split()), default=0)
            kept = longest if column.whole else words
            least.append(max([*map(_width, heading.split()), min(LONGEST_WHOLE, kept)]))
            widths.append(max(_width(heading), longest))
        while sum(widths) > room:
            wider = [number for number, width in enumerate(widths) if width > least[number]]
            if not wider:
                break
            widths[max(wider, key=widths.__getitem__)] -= 1
        return widths

    def _printed(self, widths: Sequence[int | None]) -> rich.table.Table:
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
            width = widths[number]
            printed.add_column(
                column.heading, justify=column.align, overflow=overflow, no_wrap=whole, width=width
            )
        for number, cells in enumerate(rows, start=1):
            printed.add_row(*cells, end_section=number == len(self.rows))
        return printed
