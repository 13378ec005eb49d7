"""Directories behind a URL, where machines share no disk: read as inputs, written as outputs.

    Bucket      files behind a URL of any kind that fsspec knows: s3://, gs://, hf://, file://            (`bucket`)
    fetched     a model, adapter or data file behind a URL as a path here; what is here is not fetched again  (`cache`)
    Ranged      weights that stay behind their URL, read by ranges                                        (`ranged`)
    Store       finished artefacts under a URL and under a directory of this machine, moved either way    (`artefacts`)
    following   what grows here, sent behind a URL while it grows                                         (`follow`)
    sole        one driver a URL                                                                          (`lease`)
"""

from paft.store.artefacts import Store as Store
from paft.store.artefacts import making as making
from paft.store.artefacts import places as places
from paft.store.bucket import Blob as Blob
from paft.store.bucket import Bucket as Bucket
from paft.store.bucket import is_url as is_url
from paft.store.cache import fetched as fetched
from paft.store.follow import following as following
from paft.store.lease import NOTE as NOTE
from paft.store.lease import check_sole as check_sole
from paft.store.lease import is_lost as is_lost
from paft.store.lease import sole as sole
from paft.store.ranged import KEPT as KEPT
from paft.store.ranged import Ranged as Ranged
from paft.store.ranged import WeightFile as WeightFile
from paft.store.ranged import check_unchanged as check_unchanged
from paft.store.ranged import remembered as remembered
from paft.store.ranged import source_of as source_of
from paft.store.ranged import weight_file as weight_file
from paft.store.ranged import weight_files as weight_files
