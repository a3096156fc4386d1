"""Client of the longfill prefill service.

    with longfill.Client("127.0.0.1:50051") as client:
        prefilled = client.prefill(ids, attention="vertical-slash:1000,6096")
    cache = prefilled.to_dynamic_cache(model.config)

`load_manifest(directory)` gives the same from the files of `longfill prefill` or `longfill submit`.
"""

from .client import Client, ModelInfo, Progress
from .errors import PrefillError
from .manifest import KvFile, KvManifest, KvShard
from .prefilled import Prefilled, load_manifest

__all__ = [
    "Client", "KvFile", "KvManifest", "KvShard", "ModelInfo", "PrefillError", "Prefilled", "Progress", "load_manifest",
]
__version__ = "0.1.0"
