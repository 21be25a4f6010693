"""Requests from files and from other tools' records, and back to files."""

from __future__ import annotations

from fastedit.readers.files import read_requests, write_requests
from fastedit.readers.schemas import FORMATS, format_of, request_from

__all__ = ["FORMATS", "format_of", "read_requests", "request_from", "write_requests"]
