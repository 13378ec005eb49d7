"""Directories behind a URL, where machines share no disk: read as inputs, written as outputs.

    Bucket      files behind a URL of any kind that fsspec knows: s3://, gs://, hf://, file://            (`bucket`)
    fetched     a model, adapter or data file behind a URL as a path here; what is here is not fetched again  (`cache`)
    Store       finished artefacts under a URL and under a directory of this machine, moved either way    (`artefacts`)
"""

from paft.store.artefacts import Store as Store
from paft.store.bucket import Bucket as Bucket
from paft.store.bucket import is_url as is_url
from paft.store.cache import fetched as fetched
