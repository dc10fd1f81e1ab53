"""An engine without a server: every rank carries participants, and has a part of the state; nobody has all of it."""
