"""What every room does with files: text and JSON are read by one rule, files are written whole, folders are locked.

reading.py   FileError, the error of all readers and writers; text, lines and JSON
locks.py     locks of files and folders
writing.py   replacing files and folders, making folders, being the only writer of one
"""

from latent_verse.files.locks import InUse
from latent_verse.files.reading import (
    FileError,
    decode_text,
    lines_of,
    parse_json,
    read_bytes,
    read_json,
    read_json_object,
    read_text,
    setting_named,
    text_lines,
)
from latent_verse.files.writing import (
    NotWritten,
    append,
    is_leftover,
    made_folder,
    only_writer,
    remove_leftovers,
    replacing,
    replacing_together,
    valid_json,
    write_bytes,
    write_json,
    write_text,
)

__all__ = [
    "FileError",
    "InUse",
    "NotWritten",
    "append",
    "decode_text",
    "is_leftover",
    "lines_of",
    "made_folder",
    "only_writer",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_json_object",
    "read_text",
    "remove_leftovers",
    "replacing",
    "replacing_together",
    "setting_named",
    "text_lines",
    "valid_json",
    "write_bytes",
    "write_json",
    "write_text",
]
