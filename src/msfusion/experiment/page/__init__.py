"""A run as one page of HTML: `msfusion report` writes it to a file, `msfusion watch` serves it while the run goes on.

- `about`: what a run notes for its page when it begins (`about.json`)
- `reading`: what there is in run directories, of which nothing is believed
- `learning`, `spending`, `people`, `parts`, `closing`: the sections of the page, as plain values
- `build`: all of it in one file; `write`: at the end of a run, or for a command; `serving`: over HTTP
- `assets`: what the page brings along: its style, its program, and the library that draws

The tables that commands print are in `experiment.report`.
"""
