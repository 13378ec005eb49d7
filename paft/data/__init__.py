"""Data sets: read, checked and brought to one of five shapes before any model is loaded.

    sources     a file, a directory, the demo or the hub  ->  rows as they stand
    messages    chat messages of any layout               ->  role and content
    formats     a row of any known layout                 ->  the shape of its role (sft, pref, unpaired, scored, text)
    load        columns, bad rows, mixtures               ->  checked rows
    rows        content hash, hold-out, leakage between splits
    stream      the same over data that do not fit into memory
"""

from paft.data.formats import Role as Role
from paft.data.load import Reading as Reading
from paft.data.load import load_rows as load_rows
from paft.data.load import splits as splits
from paft.data.rows import Row as Row
from paft.data.rows import Stream as Stream
from paft.data.rows import check_leakage as check_leakage
from paft.data.rows import content_hash as content_hash
from paft.data.rows import hold_out as hold_out
from paft.data.stream import dataset as dataset
from paft.data.stream import open_stream as open_stream
