"""Export's own tracing log, which pytest would collect for every test, costs a quarter of the time: not here."""

from __future__ import annotations

import logging

import torch  # noqa: F401 - sets its log handlers up

logging.getLogger("torch.__trace").handlers.clear()
logging.getLogger("torch.__trace").disabled = True
